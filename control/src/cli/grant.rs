//! `landfall grant`: the host's user gives a registered container rights beyond acting for itself.

use serde::Deserialize;
use serde_json::{Value, json};

use super::args::GrantArgs;
use super::exit::{Exit, Failure};
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Report, Talk};
use crate::daemon::rpc::client::{CallError, Client, PATIENT_BUDGET};
use crate::model::grants::{GrantFact, GrantState, Right};

/// Grants.
pub fn grant(args: &GrantArgs) -> Result<Exit, Failure> {
    let client = daemon_client::client_of_running()?;
    let grants = give(&client, &args.name, &args.what)?;
    let talk = Talk::to_stdout(args.json);
    show(talk, args.json, &args.name, &grants);
    if !args.json {
        let text = format!("a Dockerfile that {} chooses may now run with your image store", args.name);
        let hint = Some(format!("landfall revoke {} rebuild takes that back", args.name));
        Talk::to_stderr(false).report(&Report::Note { text, hint });
    }
    Ok(Exit::Ok)
}

/// Has the daemon grant rights. Returns all rights of the container.
pub(super) fn give(client: &Client, name: &str, what: &[Right]) -> Result<Vec<GrantFact>, Failure> {
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
            Failure::new(Exit::Refused, "the daemon that runs is another build, which has no grants")
                .hint("landfall up puts this build in its place")
        }
        error => daemon_client::failed(&error),
    })?;
    serde_json::from_value::<Answer>(answer)
        .map(|answer| answer.grants)
        .map_err(|error| daemon_client::other_build(&error))
}

/// Prints the rights of a container.
pub(super) fn show(talk: Talk, as_json: bool, name: &str, grants: &[GrantFact]) {
    if as_json {
        talk.plain(&json!({ "containerName": name, "grants": grants }).to_string());
        return;
    }
    let may = in_words(grants);
    let text = if may.is_empty() { format!("{name}: none") } else { format!("{name}: {may}") };
    talk.line("grants", Colour::Green, &text);
}

/// The rights of a container on one line, each with the reason why it is or is not in force where that is not obvious.
pub(super) fn in_words(grants: &[GrantFact]) -> String {
    let word = |fact: &GrantFact| {
        let folder = fact.folder.as_ref().map(|folder| folder.display().to_string()).unwrap_or_default();
        match fact.state {
            GrantState::Granted => fact.what.clone(),
            GrantState::Registered => format!("{} (by its registration)", fact.what),
            GrantState::Dormant => format!("{} (dormant: granted for {folder})", fact.what),
            GrantState::Unknown => format!("{} (not in force: of a newer build)", fact.what),
        }
    };
    grants.iter().map(word).collect::<Vec<_>>().join(", ")
}
