//! `landfall detach`: stops forwarding a Docker container, also if its labels ask for it.

use serde_json::{Value, json};

use super::args::DetachArgs;
use super::exit::{Exit, Failure};
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Printer};
use crate::daemon::rpc::client::PATIENT_BUDGET;

/// Runs the verb.
pub fn detach(args: &DetachArgs) -> Result<Exit, Failure> {
    let client = daemon_client::client()?.within(PATIENT_BUDGET);
    let request = json!({ "kind": "detach", "containerName": args.name });
    let answer = client.call(&request).map_err(|error| daemon_client::call_failure(&error))?;
    let off = answer.get("off").and_then(Value::as_bool).unwrap_or(false);
    let name = answer.get("containerName").and_then(Value::as_str).unwrap_or(&args.name);
    let printer = Printer::to_stdout(args.json);
    if args.json {
        printer.print(&json!({ "detached": name, "off": off }).to_string());
    } else if off {
        printer.line(
            "detached",
            Colour::Grey,
            &format!("{name} is not forwarded until landfall attach {name}"),
        );
    } else {
        printer.line("detached", Colour::Grey, &format!("{name} is no longer forwarded"));
    }
    Ok(Exit::Ok)
}
