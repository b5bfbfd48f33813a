//! `landfall down`: stops the daemon, and its engine after open connections had time to finish.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::args::PlainArgs;
use super::exit::{Exit, Failure};
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Printer, Report};
use crate::daemon::rpc::client::Client;

/// The maximum time for the daemon to stop. Its jobs and its engine have shorter limits.
const STOP_MAX: Duration = Duration::from_secs(60);
/// The interval between checks whether it has stopped.
const POLL: Duration = Duration::from_millis(20);
/// The delay after which a note reports that the daemon is still stopping.
const NOTE_DELAY: Duration = Duration::from_secs(3);

/// Stops the daemon. Succeeds if no daemon runs.
pub fn down(args: &PlainArgs) -> Result<Exit, Failure> {
    let home = daemon_client::home()?;
    let printer = Printer::to_stdout(args.json);
    let request = json!({ "kind": "shutdown", "engine": "drain" });
    match Client::new(home.socket()).call(&request) {
        Ok(_) => {}
        Err(error) if error.is_absent() => {
            print_outcome(args, printer, "absent", "no daemon runs");
            return Ok(Exit::Ok);
        }
        Err(error) => return Err(daemon_client::call_failure(&error)),
    }
    let start = Instant::now();
    let mut is_reported = false;
    // The daemon removes its socket file last (wire specification, A.7.8).
    while std::fs::symlink_metadata(home.socket()).is_ok() {
        if start.elapsed() > STOP_MAX {
            let text = format!("the daemon did not stop within {} s", STOP_MAX.as_secs());
            return Err(Failure::new(Exit::Refused, text).hint("landfall logs shows what it waits for"));
        }
        if start.elapsed() > NOTE_DELAY && !is_reported {
            is_reported = true;
            let text = "the daemon is finishing its work".to_owned();
            Printer::to_stderr(args.json).report(&Report::Note { text, hint: None });
        }
        thread::sleep(POLL);
    }
    print_outcome(args, printer, "stopped", "stopped; landfall up restores the registrations");
    Ok(Exit::Ok)
}

fn print_outcome(args: &PlainArgs, printer: Printer, outcome: &str, text: &str) {
    if args.json {
        printer.print(&json!({ "outcome": outcome }).to_string());
    } else {
        printer.line("daemon", Colour::Grey, text);
    }
}
