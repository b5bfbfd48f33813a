//! `landfall detach`: a container of Docker's is forwarded no longer, whatever its labels say.

use serde_json::{Value, json};

use super::args::DetachArgs;
use super::exit::{Exit, Failure};
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Talk};
use crate::daemon::rpc::client::PATIENT_BUDGET;

/// Detaches.
pub fn detach(args: &DetachArgs) -> Result<Exit, Failure> {
    let client = daemon_client::client()?.within(PATIENT_BUDGET);
    let request = json!({ "kind": "detach", "containerName": args.name });
    let answer = client.call(&request).map_err(|error| daemon_client::failed(&error))?;
    let off = answer.get("off").and_then(Value::as_bool).unwrap_or(false);
    let name = answer.get("containerName").and_then(Value::as_str).unwrap_or(&args.name);
    let talk = Talk::to_stdout(args.json);
    if args.json {
        talk.plain(&json!({ "detached": name, "off": off }).to_string());
    } else if off {
        talk.line("detached", Colour::Grey, &format!("{name} is off until landfall attach {name}"));
    } else {
        talk.line("detached", Colour::Grey, &format!("{name} is not forwarded any more"));
    }
    Ok(Exit::Ok)
}
