//! `landfall version`: which build this is, and which one the daemon is.

use serde_json::{Value, json};

use super::args::PlainArgs;
use super::exit::{Exit, Failure};
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Talk};
use crate::daemon::rpc::client::PROBE_BUDGET;
use crate::version;

/// Tells both. That no daemon runs is no failure here.
pub fn version(args: &PlainArgs) -> Result<Exit, Failure> {
    let own = version::current();
    let answer =
        daemon_client::client().ok().and_then(|client| client.within(PROBE_BUDGET).ask("version").ok());
    let daemon = answer.as_ref().and_then(|answer| answer.get("version")).and_then(Value::as_str);
    let fits = daemon.map(|daemon| version::fits(daemon, &own));
    let talk = Talk::to_stdout(args.json);
    if args.json {
        let daemon = daemon.zip(fits).map(|(version, fits)| json!({ "version": version, "fits": fits }));
        let told = json!({ "version": env!("CARGO_PKG_VERSION"), "build": own, "daemon": daemon });
        talk.plain(&told.to_string());
        return Ok(Exit::Ok);
    }
    talk.line("landfall", Colour::Green, &format!("{}, build {own}", env!("CARGO_PKG_VERSION")));
    match (daemon, fits) {
        (Some(_), Some(true)) => talk.line("daemon", Colour::Green, "the same build"),
        (Some(other), _) => {
            talk.line(
                "daemon",
                Colour::Yellow,
                &format!("build {other}; landfall up puts this one in its place"),
            );
        }
        (None, _) => talk.line("daemon", Colour::Grey, "none runs"),
    }
    Ok(Exit::Ok)
}
