//! What a command line asks for.

use tandem_block::qcow2::SnapshotName;

use crate::commands::create;
use crate::commands::snapshot;
use crate::failure::Failure;
use crate::getopt::Parsed;
use crate::size;

/// Most bytes of zeros that `-S` may ask for.
const MAX_SPARSE: u64 = 16 << 20;
/// Most parts that may be copied at once.
const MAX_COROUTINES: u64 = 16;

/// What is to be done, as far as it is told by values of options.
pub struct Request {
    /// The options of the new image.
    pub options: String,
    /// The internal snapshot that is copied.
    pub snapshot: Option<SnapshotName>,
    /// Zeros of this many bytes are not written; with 0, all are.
    pub sparse: u64,
    /// Parts that are copied at once, if that is told.
    pub coroutines: Option<u64>,
    /// Bytes that may be written per second; 0 if there is no limit.
    pub rate: u64,
}

impl Request {
    /// Reads the options of `args`, in the order in which they are there.
    pub fn from_args(args: &Parsed) -> Result<Self, Failure> {
        let mut request = Self {
            options: create::option_list(args)?,
            snapshot: None,
            sparse: 4096,
            coroutines: None,
            rate: 0,
        };
        for (id, value) in args.all() {
            let text = value.to_string_lossy();
            let between = |what: &str, min, max| {
                let parsed = size::parse_between(what, &text, min, max);
                parsed.map_err(|reason| args.name.error(&reason))
            };
            let number = |what: &str| between(what, 0, i64::MAX as u64);
            match id {
                "snapshot" => request.snapshot = Some(snapshot::selected(args, value)?),
                "sparse-size" => {
                    request.sparse = number("buffer size for sparse output")?;
                    check_sparse(args, request.sparse)?;
                }
                "coroutines" => {
                    let what = "number of coroutines";
                    let number = size::parse_count(what, &text, 1, MAX_COROUTINES);
                    request.coroutines = Some(number.map_err(|text| args.name.error(&text))?);
                }
                "rate-limit" => request.rate = number("rate limit")?,
                _ => {}
            }
        }
        request.check(args)?;
        Ok(request)
    }

    /// Refuses options that contradict each other.
    fn check(&self, args: &Parsed) -> Result<(), Failure> {
        let has = |id: &str| args.has(id);
        let reason = if has("skip-broken-bitmaps") && !has("bitmaps") {
            "Use of --skip-broken-bitmaps requires --bitmaps"
        } else if has("compress") && has("copy-offload") {
            "Cannot enable copy offloading when -c is used"
        } else if has("sparse-size") && has("copy-offload") {
            "Cannot enable copy offloading when -S is used"
        } else if has("copy-offload") && has("salvage") {
            "Cannot use copy offloading in salvaging mode"
        } else if has("target-image-opts") && !has("no-create") {
            "--target-image-opts requires use of -n flag"
        } else if has("no-create") && has("options") {
            "-o has no effect when skipping image creation"
        } else if has("target-is-zero") && !has("no-create") {
            "--target-is-zero requires use of -n flag"
        } else {
            return Ok(());
        };
        Err(args.name.error(reason))
    }
}

fn check_sparse(args: &Parsed, bytes: u64) -> Result<(), Failure> {
    if bytes.is_multiple_of(512) && bytes <= MAX_SPARSE {
        return Ok(());
    }
    Err(args.name.error(&format!(
        "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to \
         {MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
    )))
}
