//! `completions` and `man`

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

use crate::run::{Place, words};

const COMMANDS: [&str; 8] = [
    "amend", "check", "convert", "create", "info", "map", "resize", "snapshot",
];

fn print(line: &str) -> String {
    let run = Place::tandem().run(&words(line));
    assert_eq!((run.status, &*run.stderr), (Some(0), ""), "{line}");
    run.stdout
}

/// What bash offers for the last of the words of `line`.
fn offered(script: &str, line: &str) -> Vec<String> {
    let place = Place::tandem();
    fs::write(place.path("completions"), script).unwrap();
    fs::write(place.path("disk.qcow2"), "").unwrap();
    let words: Vec<_> = line.split(' ').map(|word| format!("'{word}'")).collect();
    let name = line.split(' ').next().unwrap();
    let program = format!(
        "cd '{}'; source completions; COMP_WORDS=({}); COMP_CWORD={}; COMP_LINE='{line}'; \
         COMP_POINT={}; f=$(complete -p {name}); f=${{f#*-F }}; ${{f%% *}} {name} '{}' '{}'; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        place.path("").display(),
        words.join(" "),
        words.len() - 1,
        line.len(),
        line.rsplit(' ').next().unwrap(),
        line.rsplit(' ').nth(1).unwrap(),
    );
    let output = Command::new("bash")
        .args(["--norc", "-c", &program])
        .output()
        .unwrap();
    assert!(
        output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes() {
    let script = print("completions bash");
    let offers = |line: &str, expected: &[&str]| {
        let offered = offered(&script, line);
        for word in expected {
            assert!(
                offered.iter().any(|found| found == word),
                "{line}: {word}: {offered:?}"
            );
        }
    };
    offers("tandem-img ", &COMMANDS);
    assert_eq!(offered(&script, "tandem-img sna"), ["snapshot"]);
    offers(
        "tandem-img check --",
        &["--repair", "--output", "--image-opts", "--follow"],
    );
    offers("tandem-img check -r ", &["leaks", "all"]);
    offers("tandem-img info --output ", &["human", "json"]);
    offers("tandem-img resize --preallocation f", &["falloc", "full"]);
    offers("tandem-img create -f ", &["raw", "qcow2"]);
    offers("tandem-img compare -F ", &["raw", "qcow2"]);
    offers("tandem-img rebase -T ", &["writeback", "none"]);
    // Nothing of its own: bash completes file names.
    assert_eq!(offered(&script, "tandem-img map di"), [""]);
    assert!(script.contains("-o default tandem-img"));
    offers("tandem-img man ch", &["check"]);
    offers("tandem-img completions z", &["zsh"]);
    let io = print("completions bash tandem-io");
    for (line, expected) in [
        ("tandem-io --", ["--read-only", "--cache"]),
        ("tandem-io -t ", ["none", "writeback"]),
        ("tandem-io -d ", ["unmap", "ignore"]),
    ] {
        let offered = offered(&io, line);
        let is_offered = |word: &&str| offered.iter().any(|found| found == word);
        assert!(expected.iter().all(is_offered), "{line}: {offered:?}");
    }
    // Options that are refused are not offered.
    let check = offered(&script, "tandem-img check --");
    assert!(!check.contains(&"--object".to_owned()), "{check:?}");
}

/// Each script is one that its shell can read, where the shell is there.
#[test]
fn scripts_are_valid() {
    let shells = ["bash", "zsh", "fish"].map(|shell| [(shell, ""), (shell, " tandem-io")]);
    for (shell, program) in shells.into_iter().flatten() {
        let script = print(&format!("completions {shell}{program}"));
        let words = if program.is_empty() {
            &COMMANDS[..]
        } else {
            &["read-only", "cache"]
        };
        for word in words {
            assert!(script.contains(word), "{shell}{program}: {word}");
        }
        let place = Place::tandem();
        fs::write(place.path("script"), script).unwrap();
        let checked = Command::new(shell)
            .arg("-n")
            .arg(place.path("script"))
            .output();
        match checked {
            Ok(checked) => assert!(
                checked.status.success() && checked.stderr.is_empty(),
                "{shell}: {}",
                String::from_utf8_lossy(&checked.stderr)
            ),
            Err(e) => println!("{shell}: {e}"),
        }
    }
}

/// What `man` shows of a page; `None` without such a program.
fn rendered(page: &str) -> Option<String> {
    let mut groff = Command::new("groff")
        .args(["-man", "-Tascii", "-ww", "-P-c", "-P-b", "-P-u"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .ok()?;
    groff
        .stdin
        .take()
        .unwrap()
        .write_all(page.as_bytes())
        .unwrap();
    let output = groff.wait_with_output().unwrap();
    let warnings = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && warnings.is_empty(), "{warnings}");
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn pages_tell_what_the_help_tells() {
    let program = print("man");
    for command in COMMANDS {
        assert!(
            program.contains(&format!("tandem\\-img\\-{command}(1)")),
            "{command}"
        );
        let page = print(&format!("man {command}"));
        for title in [
            ".TH",
            ".SH NAME",
            ".SH SYNOPSIS",
            ".SH OPTIONS",
            ".SH EXAMPLES",
        ] {
            assert!(page.contains(title), "{command}: {title}");
        }
        let Some(text) = rendered(&page) else {
            println!("no groff: {command} is not rendered");
            continue;
        };
        let help = print(&format!("{command} --help"));
        for option in help
            .split_whitespace()
            .filter(|word| word.starts_with("--") && word.len() > 2)
        {
            let name = option
                .trim_end_matches([',', ')', '.', ']'])
                .split('=')
                .next()
                .unwrap();
            assert!(text.contains(name), "{command}: {name}\n{text}");
        }
        // Examples keep their lines.
        let example = help
            .lines()
            .rev()
            .find(|line| line.starts_with("  tandem-img "))
            .unwrap();
        assert!(
            text.lines().any(|line| line.trim() == example.trim()),
            "{example}\n{text}"
        );
    }
    assert!(rendered(&program).is_none_or(|text| text.contains("SUBCOMMANDS")));
    let io = rendered(&print("man tandem-io"));
    assert!(io.is_none_or(|text| text.contains("--copy-on-read") && text.contains("EXAMPLES")));
}

#[test]
fn mistakes_are_named() {
    for (line, message) in [
        ("completions", "Expecting one shell: bash, zsh or fish\n"),
        (
            "completions csh",
            "Unknown shell 'csh': it must be bash, zsh or fish\n",
        ),
        (
            "completions bash tandem",
            "Expecting one shell: bash, zsh or fish\n",
        ),
        (
            "completions bash zsh",
            "Expecting one shell: bash, zsh or fish\n",
        ),
        ("man foo", "Command not found: foo\n"),
        ("man a b", "Expecting one command\n"),
    ] {
        let run = Place::tandem().run(&words(line));
        assert_eq!((run.status, &*run.stdout), (Some(1), ""), "{line}");
        assert!(
            run.stderr.starts_with(&format!("qemu-img: {message}")),
            "{}",
            run.stderr
        );
    }
}

#[test]
fn every_command_has_examples() {
    let help = print("--help");
    let commands = help.split("Commands:\n").nth(1).unwrap();
    let commands = commands.lines().take_while(|line| !line.is_empty());
    let names: Vec<_> = commands
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(
        COMMANDS.iter().all(|name| names.contains(name)),
        "{names:?}"
    );
    for name in names {
        assert!(
            print(&format!("{name} --help")).contains("Examples:"),
            "{name}"
        );
    }
    assert!(help.contains("Examples:"));
}

/// What is written to a terminal by a program of this package.
fn on_terminal(place: &Place, line: &str) -> String {
    let typed = Command::new("script")
        .args(["-qec", line, "/dev/null"])
        .current_dir(place.path(""))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    String::from_utf8(typed.stdout).unwrap().replace('\r', "")
}

/// Beyond QEMU's text, a terminal gets a hint.
#[test]
fn people_get_hints() {
    let place = Place::tandem();
    place.make("create -q -f raw raw 1M");
    place.make("create -q -f qcow2 image 1M");
    let (img, io) = (
        env!("CARGO_BIN_EXE_tandem-img"),
        env!("CARGO_BIN_EXE_tandem-io"),
    );
    for line in [
        format!("{img} info -f qcow2 raw"),
        format!("{io} -f qcow2 -c map raw"),
    ] {
        let said = on_terminal(&place, &line);
        let lines: Vec<_> = said.lines().collect();
        assert!(
            lines[0].ends_with(": Image is not in qcow2 format"),
            "{said}"
        );
        assert_eq!(
            &lines[1..],
            ["A raw disk has no header; say that it is one with -f raw"]
        );
    }
    let mut user = Command::new(io)
        .arg(place.path("image"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    user.stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut [0; 10])
        .unwrap();
    for line in [
        format!("{img} resize image 2M"),
        format!("{io} -c map image"),
    ] {
        let said = on_terminal(&place, &line);
        let hint = format!("\nIt is: process {} (tandem-io)\n", user.id());
        assert!(said.ends_with(&hint), "{said}");
    }
    user.kill().unwrap();
    user.wait().unwrap();
}
