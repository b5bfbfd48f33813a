//! `landfall restart`: the daemon stops and starts a container.
//!
//! The daemon answers before anything happens (wire specification, A.9), so what comes of it is learnt from its events,
//! to which this listens before it asks.

use std::time::{Duration, Instant};

use serde_json::json;

use super::args::RestartArgs;
use super::exit::{Exit, Failure};
use super::start;
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Talk};
use crate::daemon::rpc::client::{CallError, Lines, PATIENT_BUDGET};
use crate::docker::context::TOO_LARGE;
use crate::model::event::Event;

/// Restarts, and waits for what comes of it.
pub fn restart(args: &RestartArgs) -> Result<Exit, Failure> {
    let client = daemon_client::client_of_running()?;
    let failed = |error| daemon_client::failed(&error);
    let events = match client.events(Some(&args.name)) {
        _ if args.no_wait => None,
        // The reference does not tell events.
        Err(CallError::Invalid | CallError::Refused(_)) => None,
        events => Some(events.map_err(failed)?),
    };
    let request = json!({ "kind": "restart", "containerName": args.name, "build": args.build });
    client.within(PATIENT_BUDGET).call(&request).map_err(failed)?;
    let talk = Talk::to_stdout(args.json);
    let outcome = match events {
        Some(events) => {
            outcome(events, args)?;
            "completed"
        }
        None => "scheduled",
    };
    if args.json {
        talk.plain(&json!({ "containerName": args.name, "outcome": outcome }).to_string());
    } else {
        let text = if outcome == "completed" { "is back" } else { "is about to be restarted" };
        talk.line("restart", Colour::Green, &format!("{} {text}", args.name));
    }
    Ok(Exit::Ok)
}

/// Waits until the daemon tells what came of it.
fn outcome(mut events: Lines, args: &RestartArgs) -> Result<(), Failure> {
    let deadline = Instant::now() + Duration::from_secs(args.wait);
    loop {
        let line = events.line(Some(deadline)).map_err(|error| match error {
            CallError::Timeout(_) => {
                let text = format!("{} is not back after {} s", args.name, args.wait);
                Failure::new(Exit::Refused, text).hint("it goes on; landfall logs -f tells what comes of it")
            }
            _ => Failure::new(Exit::NoDaemon, "the daemon ended before the restart did")
                .hint("landfall up starts one; landfall logs tells how far it came"),
        })?;
        match serde_json::from_slice(&line) {
            Ok(Event::RestartCompleted { container_name }) if container_name == args.name => return Ok(()),
            Ok(Event::RestartFailed { container_name, reason }) if container_name == args.name => {
                let failure =
                    Failure::new(Exit::Refused, format!("{container_name} was not restarted: {reason}"));
                // The limit is the daemon's.
                return Err(match reason.contains(TOO_LARGE) {
                    true => failure.hint(start::too_large_hint("up")),
                    false => failure,
                });
            }
            _ => {}
        }
    }
}
