//! `landfall deregister`: the daemon forgets a container; what is forwarded from it ends.

use serde_json::{Value, json};

use super::args::DeregisterArgs;
use super::exit::{Exit, Failure};
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Talk};
use crate::daemon::rpc::client::{Client, PATIENT_BUDGET};
use crate::model::registration::FoundBy;

/// Deregisters. The daemon finds nothing wrong with a name that it does not know; a person who typed it might.
pub fn deregister(args: &DeregisterArgs) -> Result<Exit, Failure> {
    let client = daemon_client::client()?.within(PATIENT_BUDGET);
    let failed = |error| daemon_client::failed(&error);
    // Waits until the registrations of the last daemon are back, so that the name is not missed in the list.
    client.call(&json!({ "kind": "status", "containerName": args.name })).map_err(failed)?;
    refuse_what_comes_back(&client, &args.name)?;
    client.call(&json!({ "kind": "deregister", "containerName": args.name })).map_err(failed)?;
    let talk = Talk::to_stdout(args.json);
    if args.json {
        talk.plain(&json!({ "deregistered": Value::from(args.name.as_str()) }).to_string());
    } else {
        talk.line("removed", Colour::Grey, &format!("{} is not registered any more", args.name));
    }
    Ok(Exit::Ok)
}

/// What the daemon finds by itself is registered again in the next moment.
fn refuse_what_comes_back(client: &Client, name: &str) -> Result<(), Failure> {
    let containers =
        daemon_client::describe(client)?.into_iter().flat_map(|description| description.containers);
    let found_by = containers.filter(|own| own.state.container_name == name).find_map(|own| own.found_by);
    let why = match found_by {
        Some(FoundBy::Label) => "its label says that it is",
        Some(FoundBy::All) => "all are",
        Some(FoundBy::Name) | None => return Ok(()),
    };
    Err(Failure::new(Exit::Refused, format!("{name} would be forwarded again at once, since {why}"))
        .hint(format!("landfall detach {name} turns it off")))
}
