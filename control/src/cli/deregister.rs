//! `landfall deregister`: removes the registration of a container; the forwards of its ports end.

use serde_json::{Value, json};

use super::args::DeregisterArgs;
use super::exit::{Exit, Failure};
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Printer};
use crate::daemon::rpc::client::{Client, PATIENT_BUDGET};
use crate::model::registration::FoundBy;

/// Runs the verb. The daemon accepts the deregistration of an unknown name; this verb fails, since the user may have
/// mistyped it.
pub fn deregister(args: &DeregisterArgs) -> Result<Exit, Failure> {
    let client = daemon_client::client()?.within(PATIENT_BUDGET);
    let failed = |error| daemon_client::call_failure(&error);
    // This request waits until the daemon has loaded the registrations of its predecessor. A name that is loaded later
    // would be missed in the list.
    client.call(&json!({ "kind": "status", "containerName": args.name })).map_err(failed)?;
    refuse_discovered(&client, &args.name)?;
    client.call(&json!({ "kind": "deregister", "containerName": args.name })).map_err(failed)?;
    let printer = Printer::to_stdout(args.json);
    if args.json {
        printer.print(&json!({ "deregistered": Value::from(args.name.as_str()) }).to_string());
    } else {
        printer.line("removed", Colour::Grey, &format!("{} is no longer registered", args.name));
    }
    Ok(Exit::Ok)
}

/// Fails for a container that the daemon discovers: it would be registered again at once.
fn refuse_discovered(client: &Client, name: &str) -> Result<(), Failure> {
    let containers =
        daemon_client::describe(client)?.into_iter().flat_map(|description| description.containers);
    let found_by = containers.filter(|own| own.state.container_name == name).find_map(|own| own.found_by);
    let why = match found_by {
        Some(FoundBy::Label) => "its label asks for it",
        Some(FoundBy::All) => "the daemon forwards all containers",
        Some(FoundBy::Name) | None => return Ok(()),
    };
    Err(Failure::new(Exit::Refused, format!("{name} would be forwarded again at once, since {why}"))
        .hint(format!("landfall detach {name} stops forwarding")))
}
