//! `landfall deregister`: the daemon forgets a container; what is forwarded from it ends.

use serde_json::{Value, json};

use super::args::DeregisterArgs;
use super::asking;
use super::exit::{Exit, Failure};
use super::output::{Colour, Talk};
use crate::rpc::client::PATIENT_BUDGET;

/// Deregisters. The daemon finds nothing wrong with a name that it does not know; a person who typed it might.
pub fn deregister(args: &DeregisterArgs) -> Result<Exit, Failure> {
    let client = asking::client()?.within(PATIENT_BUDGET);
    let failed = |error| asking::failed(&error);
    // Waits until the registrations of the last daemon are back, so that the name is not missed in the list.
    client.call(&json!({ "kind": "status", "containerName": args.name })).map_err(failed)?;
    client.call(&json!({ "kind": "deregister", "containerName": args.name })).map_err(failed)?;
    let talk = Talk::to_stdout(args.json);
    if args.json {
        talk.plain(&json!({ "deregistered": Value::from(args.name.as_str()) }).to_string());
    } else {
        talk.line("removed", Colour::Grey, &format!("{} is not registered any more", args.name));
    }
    Ok(Exit::Ok)
}
