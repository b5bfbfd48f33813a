//! `landfall events`: prints the daemon's events as they happen.

use jiff::tz::TimeZone;

use super::args::EventsArgs;
use super::exit::{Exit, Failure};
use crate::cli::daemon_client;
use crate::cli::ui::output::Printer;
use crate::cli::ui::sentence::sentence;
use crate::daemon::rpc::client::CallError;

/// Prints events until the daemon ends, a signal arrives, or the reader of standard output closes it.
pub fn events(args: &EventsArgs) -> Result<Exit, Failure> {
    let mut lines =
        daemon_client::client()?.events(args.container.as_deref()).map_err(|error| match error {
            CallError::Invalid => daemon_client::call_failure(&CallError::Refused(
                "the daemon does not support events".to_owned(),
            )),
            error => daemon_client::call_failure(&error),
        })?;
    let printer = Printer::to_stdout(args.json);
    let zone = TimeZone::system();
    loop {
        let line = match lines.line(None) {
            Ok(line) => String::from_utf8_lossy(&line).into_owned(),
            Err(CallError::Ended | CallError::Broken(_)) => {
                return Err(
                    Failure::new(Exit::NoDaemon, "the daemon has ended").hint("landfall up starts one")
                );
            }
            Err(error) => return Err(daemon_client::call_failure(&error)),
        };
        let written = if args.json {
            printer.try_print(&line)
        } else {
            printer.try_print(&sentence(printer, &line, &zone))
        };
        // The reader has closed the pipe.
        if written.is_err() {
            return Ok(Exit::Ok);
        }
    }
}
