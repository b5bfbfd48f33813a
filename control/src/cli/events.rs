//! `landfall events`: what happens in the daemon, as it happens.

use jiff::tz::TimeZone;

use super::args::EventsArgs;
use super::exit::{Exit, Failure};
use crate::cli::daemon_client;
use crate::cli::ui::output::Talk;
use crate::cli::ui::sentence::sentence;
use crate::daemon::rpc::client::CallError;

/// Tells until the daemon ends, or somebody asks us to.
pub fn events(args: &EventsArgs) -> Result<Exit, Failure> {
    let mut lines =
        daemon_client::client()?.events(args.container.as_deref()).map_err(|error| match error {
            CallError::Invalid => {
                daemon_client::failed(&CallError::Refused("the daemon does not tell events".to_owned()))
            }
            error => daemon_client::failed(&error),
        })?;
    let talk = Talk::to_stdout(args.json);
    let zone = TimeZone::system();
    loop {
        let line = match lines.line(None) {
            Ok(line) => String::from_utf8_lossy(&line).into_owned(),
            Err(CallError::Ended | CallError::Broken(_)) => {
                return Err(
                    Failure::new(Exit::NoDaemon, "the daemon has ended").hint("landfall up starts one")
                );
            }
            Err(error) => return Err(daemon_client::failed(&error)),
        };
        let written =
            if args.json { talk.try_plain(&line) } else { talk.try_plain(&sentence(talk, &line, &zone)) };
        // Whoever reads a pipe has seen enough.
        if written.is_err() {
            return Ok(Exit::Ok);
        }
    }
}
