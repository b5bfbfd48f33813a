//! `landfall restart`: the daemon stops and starts a container.
//!
//! The daemon answers before it restarts the container (wire specification, A.9). The outcome is an event, so this verb
//! subscribes to events before it sends the request.

use std::time::{Duration, Instant};

use serde_json::json;

use super::args::RestartArgs;
use super::exit::{Exit, Failure};
use super::start;
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Printer};
use crate::daemon::rpc::client::{CallError, Lines, PATIENT_BUDGET};
use crate::docker::context::TOO_LARGE;
use crate::model::event::Event;

/// Requests a restart, and waits for its outcome.
pub fn restart(args: &RestartArgs) -> Result<Exit, Failure> {
    let client = daemon_client::client_of_running()?;
    let failed = |error| daemon_client::call_failure(&error);
    let events = match client.events(Some(&args.name)) {
        _ if args.no_wait => None,
        // The reference implementation does not support events.
        Err(CallError::Invalid | CallError::Refused(_)) => None,
        events => Some(events.map_err(failed)?),
    };
    let request = json!({ "kind": "restart", "containerName": args.name, "build": args.build });
    client.within(PATIENT_BUDGET).call(&request).map_err(failed)?;
    let printer = Printer::to_stdout(args.json);
    let outcome = match events {
        Some(events) => {
            outcome(events, args)?;
            "completed"
        }
        None => "scheduled",
    };
    if args.json {
        printer.print(&json!({ "containerName": args.name, "outcome": outcome }).to_string());
    } else {
        let text = if outcome == "completed" { "is running again" } else { "is scheduled for a restart" };
        printer.line("restart", Colour::Green, &format!("{} {text}", args.name));
    }
    Ok(Exit::Ok)
}

/// Waits for the event with the outcome.
fn outcome(mut events: Lines, args: &RestartArgs) -> Result<(), Failure> {
    let deadline = Instant::now() + Duration::from_secs(args.wait);
    loop {
        let line = events.line(Some(deadline)).map_err(|error| match error {
            CallError::Timeout(_) => {
                let text = format!("{} was not restarted within {} s", args.name, args.wait);
                Failure::new(Exit::Refused, text)
                    .hint("the restart continues; landfall logs -f shows its outcome")
            }
            _ => Failure::new(Exit::NoDaemon, "the daemon ended before the restart did")
                .hint("landfall up starts it; landfall logs shows the progress of the restart"),
        })?;
        match serde_json::from_slice(&line) {
            Ok(Event::RestartCompleted { container_name }) if container_name == args.name => return Ok(()),
            Ok(Event::RestartFailed { container_name, reason }) if container_name == args.name => {
                let failure =
                    Failure::new(Exit::Refused, format!("{container_name} was not restarted: {reason}"));
                // The limit is an option of the daemon.
                return Err(match reason.contains(TOO_LARGE) {
                    true => failure.hint(start::too_large_hint("up")),
                    false => failure,
                });
            }
            _ => {}
        }
    }
}
