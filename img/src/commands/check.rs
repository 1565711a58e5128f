//! `tandem-img check`

use std::borrow::Cow;
use std::ffi::OsStr;

use clap::Command;
use serde::Serialize;
use tandem_block::qcow2::{self, CheckOptions, CheckReport, Repair};
use tandem_block::{FileOptions, ImageFormat};

use crate::common_options::{
    cache, cache_option, follow, follow_option, force_share_option, format_option,
    image_opts_option, locking, object_option, output_option, progress_option, quiet_option,
};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, value};
use crate::image::{Image, could_not_open};
use crate::output::{self, Output};
use crate::progress::Progress;

/// Exit status: the image has errors.
const CORRUPT: u8 = 2;
/// Exit status: the image has leaked clusters and no errors.
const LEAKS: u8 = 3;
/// Exit status: the format has nothing to check.
const UNSUPPORTED: u8 = 63;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "check",
        "Checks the metadata of an image, and repairs it with -r",
        "tandem-img check [-f FMT | --image-opts] [--output human|json] [-r leaks|all] [-q] \
         [-p] [-T MODE] [-U] FILENAME",
    )
    .args([
        quiet_option(),
        progress_option(),
        format_option("the image"),
        output_option(),
        force_share_option(),
        cache_option("source-cache", 'T', "the image").long("cache"),
        value(
            "repair",
            Some('r'),
            "leaks|all",
            "Repair leaked clusters only, or all that can be without loss of data",
        ),
        follow_option(),
        image_opts_option(),
        object_option(),
    ])
    .after_help(
        "Exit status: 0 no errors, 1 the check failed, 2 errors, 3 only leaked clusters, \
         63 the format has no checks.\n\n\
         No other program may use an image that is repaired. A repair that was interrupted can be \
         repeated.\n\n\
         Examples:\n  \
         tandem-img check disk.qcow2\n  \
         tandem-img check -r all disk.qcow2\n  \
         tandem-img check --output=json disk.qcow2",
    )
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json<'a> {
    #[serde(skip_serializing_if = "is_zero")]
    image_end_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    compressed_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    total_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions_fixed: u64,
    check_errors: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    allocated_clusters: u64,
    filename: Cow<'a, str>,
    format: &'static str,
    #[serde(skip_serializing_if = "is_zero")]
    fragmented_clusters: u64,
}

impl<'a> Json<'a> {
    fn new(image: &'a Image<'_>, report: &CheckReport) -> Self {
        Self {
            image_end_offset: report.image_end_offset,
            compressed_clusters: report.compressed_clusters,
            total_clusters: report.total_clusters,
            corruptions: report.corruptions,
            corruptions_fixed: report.corruptions_fixed,
            check_errors: report.check_errors,
            leaks: report.leaks,
            leaks_fixed: report.leaks_fixed,
            allocated_clusters: report.allocated_clusters,
            filename: image.name.to_string_lossy(),
            format: image.format.name(),
            fragmented_clusters: report.fragmented_clusters,
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let output = Output::from_args(args)?;
    let repair = repair(args)?;
    let files = FileOptions {
        locking: locking(args),
        cache: cache(args, "source-cache")?,
    };
    let follow = follow(args)?;
    args.refuse_objects()?;
    let image = Image::from_args(args)?;
    let opened = |reason: &str| args.name.error(&could_not_open(image.name, reason));
    let read_only = repair == Repair::Nothing;
    let open = image
        .options(read_only, follow, files)
        .map_err(|e| opened(&e.reason()))?;
    let options = CheckOptions {
        repair,
        follow: open.follow,
        data_file: open.data_file,
        files: open.files,
        ..CheckOptions::default()
    };
    if !read_only {
        image.warn_of_guess();
    }
    if image.format == ImageFormat::Raw {
        let failure = args.name.error("This image format does not support checks");
        return Err(Failure {
            status: UNSUPPORTED,
            ..failure
        });
    }
    let mut report = check(args, &image, &options)?;
    if report.corruptions_fixed > 0 || report.leaks_fixed > 0 {
        if output == Output::Human && !args.has("quiet") {
            output::print(&repaired(&report));
        }
        let (corruptions_fixed, leaks_fixed) = (report.corruptions_fixed, report.leaks_fixed);
        let again = CheckOptions {
            repair: Repair::Nothing,
            ..options
        };
        report = check(args, &image, &again)?;
        (report.corruptions_fixed, report.leaks_fixed) = (corruptions_fixed, leaks_fixed);
    }
    if !args.has("quiet") {
        match output {
            Output::Human => output::print(&human(&report)),
            Output::Json => output::print_json(&Json::new(&image, &report)),
        }
    }
    let silent = |status| {
        Err(Failure {
            message: String::new(),
            status,
        })
    };
    match report {
        CheckReport {
            check_errors: 1.., ..
        } => Err(args.name.error("Check failed")),
        CheckReport {
            corruptions: 1.., ..
        } => silent(CORRUPT),
        CheckReport { leaks: 1.., .. } => silent(LEAKS),
        _ => Ok(()),
    }
}

/// What `-r` says.
fn repair(args: &Parsed) -> Result<Repair, Failure> {
    match args.value("repair").map(OsStr::to_string_lossy).as_deref() {
        None => Ok(Repair::Nothing),
        Some("leaks") => Ok(Repair::Leaks),
        Some("all") => Ok(Repair::All),
        Some(other) => Err(args.name.usage(&format!(
            "--repair (-r) expects 'leaks' or 'all' not '{other}'"
        ))),
    }
}

/// Checks `image`, and shows on a terminal how far that has come.
fn check(
    args: &Parsed,
    image: &Image<'_>,
    options: &CheckOptions<'_>,
) -> Result<CheckReport, Failure> {
    let bar = Progress::new(args);
    let progress = |done, total| bar.set(done, total);
    let options = CheckOptions {
        progress: Some(&progress),
        data_file: options.data_file.clone(),
        ..*options
    };
    let report = qcow2::check(&image.path, &options, &mut |finding| {
        bar.suspend(|| output::complain_line(&finding.text));
    });
    drop(bar);
    report.map_err(|e| args.name.error(&could_not_open(image.name, &e.reason())))
}

/// What has been repaired, for people.
fn repaired(report: &CheckReport) -> String {
    format!(
        "The following inconsistencies were found and repaired:\n\n    \
         {} leaked clusters\n    {} corruptions\n\n\
         Double checking the fixed image now...\n",
        report.leaks_fixed, report.corruptions_fixed
    )
}

fn human(report: &CheckReport) -> String {
    let mut text = String::new();
    if report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0 {
        text += "No errors were found on the image.\n";
    }
    if report.corruptions > 0 {
        text += &format!(
            "\n{} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n",
            report.corruptions
        );
    }
    if report.leaks > 0 {
        text += &format!(
            "\n{} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n",
            report.leaks
        );
    }
    if report.check_errors > 0 {
        text += &format!(
            "\n{} internal errors have occurred during the check.\n",
            report.check_errors
        );
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        text += &format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters),
        );
    }
    if report.image_end_offset > 0 {
        text += &format!("Image end offset: {}\n", report.image_end_offset);
    }
    text
}
