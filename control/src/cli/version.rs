//! `landfall version`: shows the build of this program and of the daemon.

use serde_json::{Value, json};

use super::args::PlainArgs;
use super::exit::{Exit, Failure};
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Printer};
use crate::daemon::rpc::client::PROBE_BUDGET;
use crate::version;

/// Runs the verb. Succeeds if no daemon runs.
pub fn version(args: &PlainArgs) -> Result<Exit, Failure> {
    let own = version::current();
    let answer =
        daemon_client::client().ok().and_then(|client| client.within(PROBE_BUDGET).ask("version").ok());
    let daemon = answer.as_ref().and_then(|answer| answer.get("version")).and_then(Value::as_str);
    let fits = daemon.map(|daemon| version::fits(daemon, &own));
    let printer = Printer::to_stdout(args.json);
    if args.json {
        let daemon = daemon.zip(fits).map(|(version, fits)| json!({ "version": version, "fits": fits }));
        let value = json!({ "version": env!("CARGO_PKG_VERSION"), "build": own, "daemon": daemon });
        printer.print(&value.to_string());
        return Ok(Exit::Ok);
    }
    printer.line("landfall", Colour::Green, &format!("{}, build {own}", env!("CARGO_PKG_VERSION")));
    match (daemon, fits) {
        (Some(_), Some(true)) => printer.line("daemon", Colour::Green, "the same build"),
        (Some(other), _) => {
            printer.line(
                "daemon",
                Colour::Yellow,
                &format!("build {other}; landfall up replaces it with this build"),
            );
        }
        (None, _) => printer.line("daemon", Colour::Grey, "not running"),
    }
    Ok(Exit::Ok)
}
