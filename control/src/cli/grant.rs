//! `landfall grant`: gives a registered container rights beyond acting for itself.

use serde::Deserialize;
use serde_json::{Value, json};

use super::args::GrantArgs;
use super::exit::{Exit, Failure};
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Printer, Report};
use crate::daemon::rpc::client::{CallError, Client, PATIENT_BUDGET};
use crate::model::grants::{GrantFact, GrantState, Right};

/// Runs the verb.
pub fn grant(args: &GrantArgs) -> Result<Exit, Failure> {
    let client = daemon_client::client_of_running()?;
    let grants = grant_rights(&client, &args.name, &args.rights)?;
    let printer = Printer::to_stdout(args.json);
    show(printer, args.json, &args.name, &grants);
    if !args.json {
        let text = format!("a Dockerfile that {} chooses may now run with your image store", args.name);
        let hint = Some(format!("landfall revoke {} rebuild revokes this right", args.name));
        Printer::to_stderr(false).report(&Report::Note { text, hint });
    }
    Ok(Exit::Ok)
}

/// Has the daemon grant rights. Returns all rights of the container.
pub(super) fn grant_rights(client: &Client, name: &str, what: &[Right]) -> Result<Vec<GrantFact>, Failure> {
    let what: Vec<String> = what.iter().map(ToString::to_string).collect();
    change(client, &json!({ "kind": "grant", "containerName": name, "what": what }))
}

/// Has the daemon change grants. Returns all rights of the container.
pub(super) fn change(client: &Client, request: &Value) -> Result<Vec<GrantFact>, Failure> {
    #[derive(Deserialize)]
    struct Answer {
        grants: Vec<GrantFact>,
    }
    let answer = client.within(PATIENT_BUDGET).call(request).map_err(|error| match error {
        CallError::Refused(reason) if reason == "unknown request kind" => {
            Failure::new(Exit::Refused, "the running daemon is another build, which does not support grants")
                .hint("landfall up replaces it with this build")
        }
        error => daemon_client::call_failure(&error),
    })?;
    serde_json::from_value::<Answer>(answer)
        .map(|answer| answer.grants)
        .map_err(|error| daemon_client::description_failure(&error))
}

/// Prints the rights of a container.
pub(super) fn show(printer: Printer, as_json: bool, name: &str, grants: &[GrantFact]) {
    if as_json {
        printer.print(&json!({ "containerName": name, "grants": grants }).to_string());
        return;
    }
    let may = describe(grants);
    let text = if may.is_empty() { format!("{name}: none") } else { format!("{name}: {may}") };
    printer.line("grants", Colour::Green, &text);
}

/// Formats the rights of a container on one line, each with the reason for its state if the state is not plainly
/// `Granted`.
pub(super) fn describe(grants: &[GrantFact]) -> String {
    let word = |fact: &GrantFact| {
        let folder = fact.folder.as_ref().map(|folder| folder.display().to_string()).unwrap_or_default();
        match fact.state {
            GrantState::Granted => fact.what.clone(),
            GrantState::Registered => format!("{} (by its registration)", fact.what),
            GrantState::Dormant => format!("{} (dormant: granted for {folder})", fact.what),
            GrantState::Unknown => format!("{} (not in force: it needs a newer build)", fact.what),
        }
    };
    grants.iter().map(word).collect::<Vec<_>>().join(", ")
}
