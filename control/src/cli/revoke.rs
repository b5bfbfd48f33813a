//! `landfall revoke`: the host's user takes rights away from a container.

use serde_json::json;

use super::args::RevokeArgs;
use super::exit::{Exit, Failure};
use super::grant;
use crate::cli::daemon_client;
use crate::cli::ui::output::Talk;

/// Revokes.
pub fn revoke(args: &RevokeArgs) -> Result<Exit, Failure> {
    let client = daemon_client::client_of_running()?;
    let request = json!({ "kind": "revoke", "containerName": args.name.as_str(), "what": args.what });
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
    grant::show(Talk::to_stdout(args.json), args.json, args.name.as_str(), &grants);
    Ok(Exit::Ok)
}
