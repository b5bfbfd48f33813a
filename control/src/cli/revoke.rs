//! `landfall revoke`: revokes rights of a container.

use serde_json::json;

use super::args::RevokeArgs;
use super::exit::{Exit, Failure};
use super::grant;
use crate::cli::daemon_client;
use crate::cli::ui::output::Printer;

/// Runs the verb.
pub fn revoke(args: &RevokeArgs) -> Result<Exit, Failure> {
    let client = daemon_client::client_of_running()?;
    let request = json!({ "kind": "revoke", "containerName": args.name.as_str(), "what": args.rights });
    let grants = grant::change(&client, &request).map_err(|failure| {
        let of_registration = failure.message.contains(" comes with the registration of ");
        match of_registration {
            true => failure.hint(format!(
                "register it with an attach method, such as: landfall register {} --docker",
                args.name
            )),
            false => failure,
        }
    })?;
    grant::show(Printer::to_stdout(args.json), args.json, args.name.as_str(), &grants);
    Ok(Exit::Ok)
}
