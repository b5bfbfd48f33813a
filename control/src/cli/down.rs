//! `landfall down`: the daemon ends, and the engine with it, once its connections have had a moment to finish.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::args::PlainArgs;
use super::exit::{Exit, Failure};
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Report, Talk};
use crate::daemon::rpc::client::Client;

/// How long the daemon may take: its jobs and its engine have bounds of their own within this.
const STOP_MAX: Duration = Duration::from_secs(60);
/// How often it is looked for.
const POLL: Duration = Duration::from_millis(20);
/// After this long, people are told that it takes its time.
const TELL_AFTER: Duration = Duration::from_secs(3);

/// Stops the daemon; none is as good.
pub fn down(args: &PlainArgs) -> Result<Exit, Failure> {
    let home = daemon_client::home()?;
    let talk = Talk::to_stdout(args.json);
    let request = json!({ "kind": "shutdown", "engine": "drain" });
    match Client::new(home.socket()).call(&request) {
        Ok(_) => {}
        Err(error) if error.is_absent() => {
            tell(args, talk, "absent", "no daemon runs");
            return Ok(Exit::Ok);
        }
        Err(error) => return Err(daemon_client::failed(&error)),
    }
    let began = Instant::now();
    let mut told = false;
    // The socket's file is the last thing that goes (wire specification, A.7.8).
    while std::fs::symlink_metadata(home.socket()).is_ok() {
        if began.elapsed() > STOP_MAX {
            let text = format!("the daemon was asked to end and has not within {} s", STOP_MAX.as_secs());
            return Err(Failure::new(Exit::Refused, text).hint("landfall logs tells what it waits for"));
        }
        if began.elapsed() > TELL_AFTER && !told {
            told = true;
            let text = "the daemon finishes what it is doing".to_owned();
            Talk::to_stderr(args.json).report(&Report::Note { text, hint: None });
        }
        thread::sleep(POLL);
    }
    tell(args, talk, "stopped", "stopped; what is registered comes back with landfall up");
    Ok(Exit::Ok)
}

fn tell(args: &PlainArgs, talk: Talk, outcome: &str, text: &str) {
    if args.json {
        talk.plain(&json!({ "outcome": outcome }).to_string());
    } else {
        talk.line("daemon", Colour::Grey, text);
    }
}
