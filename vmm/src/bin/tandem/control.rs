//! `tandem control`: operates a running VM from a shell.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{self, PathBuf};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use clap::Args;
use serde_json::{Map, Value, json};

/// Most bytes of an answer.
const MAX_ANSWER: u64 = 4 << 20;
/// How often to ask whether a job has ended.
const INTERVAL: Duration = Duration::from_millis(100);
/// Arguments whose text is the path of a file.
const PATHS: [&str; 4] = ["base", "fork", "overlay", "scratch_dir"];

/// Operate a running VM
///
/// Sends one request to the socket that `tandem run --control` has made, and prints the answer as JSON.
#[derive(Args)]
#[command(after_long_help = "\
Values:
  A number, true, false, and anything else that is JSON, is that; everything else is text. Paths are relative
  to the current directory. docs/control.md tells the commands, their arguments, and their answers.

Exit status:
  0  It was done
  1  It was not, and one line says why
  2  The command line is wrong

Examples:
  tandem control vm.sock status
  tandem control vm.sock resize disk=vda size=40G
  tandem control vm.sock fork disk=vda overlay=/vm/vda.1 fork=/vm/other
  tandem control --wait vm.sock commit disk=vda pivot=true
  tandem control vm.sock disks | jq -r '.disks[].path'")]
pub struct Control {
    /// Wait until the job that the command begins has ended, and fail if the job has failed
    #[arg(long)]
    wait: bool,
    /// The socket of the VM
    socket: PathBuf,
    /// What to do, such as status, disks, pause, resume, flush, resize, fork, commit, jobs or shutdown
    command: String,
    /// What the command needs to know
    #[arg(value_name = "ARGUMENT=VALUE", value_parser = argument)]
    arguments: Vec<(String, Value)>,
}

fn argument(text: &str) -> Result<(String, Value), String> {
    let (key, value) = text
        .split_once('=')
        .ok_or("it is not of the form ARGUMENT=VALUE")?;
    let mut value: Value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
    if let (true, Some(path)) = (PATHS.contains(&key), value.as_str()) {
        let absolute = path::absolute(path).map_err(|e| format!("'{path}': {e}"))?;
        value = absolute.to_str().ok_or("the path is not UTF-8")?.into();
    }
    Ok((key.to_owned(), value))
}

impl Control {
    pub fn execute(self) -> ExitCode {
        match self.perform() {
            Ok(answer) => {
                // Whoever does not read on does not want to know.
                let _ = writeln!(io::stdout(), "{answer:#}");
                ExitCode::SUCCESS
            }
            Err(message) => {
                let _ = writeln!(io::stderr(), "tandem: {message}");
                ExitCode::FAILURE
            }
        }
    }

    fn perform(&self) -> Result<Value, String> {
        if self.command == "backup-read" {
            return Err("data is not text: tandem-img backup --control makes backups".to_owned());
        }
        let mut request = Map::from_iter(self.arguments.iter().cloned());
        request.insert("command".to_owned(), self.command.clone().into());
        let answer = self.ask(&request.into())?;
        match (self.wait, &answer["job"]) {
            (true, Value::Number(job)) => self.ended(&Value::from(job.clone())),
            _ => Ok(answer),
        }
    }

    /// The job of that number, once it has ended.
    fn ended(&self, number: &Value) -> Result<Value, String> {
        loop {
            let answer = self.ask(&json!({"command": "jobs"}))?;
            let mut jobs = answer["jobs"].as_array().into_iter().flatten();
            let job = jobs
                .find(|job| job["job"] == *number)
                .ok_or("the job has been forgotten, after many later ones")?;
            match job["state"].as_str() {
                Some("running") => sleep(INTERVAL),
                Some("done") => return Ok(job.clone()),
                state => {
                    let why = job["error"].as_str().or(state);
                    return Err(why.unwrap_or("the job has not been done").to_owned());
                }
            }
        }
    }

    fn ask(&self, request: &Value) -> Result<Value, String> {
        let socket = self.socket.display();
        let wrong = |what: &'static str| {
            let socket = &socket;
            move |e: io::Error| format!("'{socket}': Could not {what}: {e}")
        };
        let mut stream = UnixStream::connect(&self.socket).map_err(wrong("connect"))?;
        let sent = stream.write_all(format!("{request}\n").as_bytes());
        let mut line = String::new();
        let mut reader = BufReader::new(stream.take(MAX_ANSWER));
        // Someone who is not let in is told so before anything is taken from him.
        let read = reader.read_line(&mut line);
        if line.is_empty() {
            sent.map_err(wrong("send the request"))?;
        }
        read.map_err(wrong("read the answer"))?;
        let answer: Value = serde_json::from_str(&line).unwrap_or_default();
        if let Some(message) = answer["error"]["message"].as_str() {
            return Err(message.to_owned());
        }
        let done = answer.get("ok").cloned();
        done.ok_or_else(|| format!("'{socket}': the VM has ended, or this is not its socket"))
    }
}
