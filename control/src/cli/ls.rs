//! `landfall ls`: what is registered and what is forwarded, in one table.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde_json::json;

use super::args::LsArgs;
use super::exit::{Exit, Failure};
use super::traffic;
use crate::cli::daemon_client::{self, Container};
use crate::cli::ui::output::{Report, Talk};
use crate::cli::ui::table::{NOTHING, table};
use crate::daemon::discovery::report::{Forwarded, Found};
use crate::daemon::rpc::client::Client;
use crate::model::forward_table::{ContainerState, ForwardPath, ForwardRow, Reachability, RowState};
use crate::model::grants::{GrantFact, GrantState};
use crate::model::registration::FoundBy;
use crate::model::size::ByteSize;

const HEADING: [&str; 9] = ["NAME", "STATE", "PORT", "HOST", "PATH", "PROCESS", "CONNS", "BYTES", "WHY"];

/// Lists.
pub fn ls(args: &LsArgs) -> Result<Exit, Failure> {
    let client = daemon_client::client()?;
    if args.all {
        return every_container(&client, args.json);
    }
    let mut description = daemon_client::described(&client)?;
    traffic::count(&mut description.containers);
    let talk = Talk::to_stdout(args.json);
    if args.json {
        let told = json!({ "engine": description.engine, "containers": description.containers });
        talk.plain(&told.to_string());
        return Ok(Exit::Ok);
    }
    if description.containers.is_empty() {
        let hint = "landfall run and attach bring something here; landfall ls --all shows what Docker has"
            .to_owned();
        let text = if description.replayed {
            "nothing is registered"
        } else {
            "the registrations of the last daemon are on their way back"
        };
        talk.report(&Report::Note { text: text.to_owned(), hint: Some(hint) });
    } else {
        talk.plain(&listing(&description.containers));
    }
    Ok(Exit::Ok)
}

/// What Docker has, and why it is forwarded or not.
fn every_container(client: &Client, json: bool) -> Result<Exit, Failure> {
    let found = daemon_client::containers(client)?;
    let talk = Talk::to_stdout(json);
    if json {
        talk.plain(&json!({ "containers": found }).to_string());
    } else if found.is_empty() {
        let text = "Docker has no containers".to_owned();
        talk.report(&Report::Note { text, hint: None });
    } else {
        talk.plain(&all_of(&found));
        let aside = Talk::to_stderr(json);
        for one in &found {
            if let (Some(why), Some(hint)) = (&one.why, &one.hint) {
                let text = format!("{} is not forwarded: {why}", one.name);
                aside.report(&Report::Note { text, hint: Some(format!("{hint} has it forwarded")) });
            }
        }
    }
    Ok(Exit::Ok)
}

/// One row a container of Docker's.
fn all_of(found: &[Found]) -> String {
    let rows: Vec<_> = found
        .iter()
        .map(|one| {
            let runs = if one.running { "yes" } else { "no" };
            [
                one.name.clone(),
                one.image.clone(),
                runs.to_owned(),
                forwarded(one),
                granted(one),
                one.why.clone().unwrap_or_default(),
            ]
        })
        .collect();
    let text = table(["CONTAINER", "IMAGE", "RUNS", "FORWARDED", "GRANTS", "WHY"], &rows);
    without_empty_end(&text, &rows.iter().map(|row| row[5].as_str()).collect::<Vec<_>>())
}

fn granted(one: &Found) -> String {
    let word = |fact: &GrantFact| match fact.state {
        GrantState::Granted | GrantState::Registered => fact.what.clone(),
        GrantState::Dormant => format!("{} (dormant)", fact.what),
        GrantState::Unknown => format!("{} (unknown)", fact.what),
    };
    let granted: Vec<String> = one.grants.iter().map(word).collect();
    if granted.is_empty() { NOTHING.to_owned() } else { granted.join(", ") }
}

fn forwarded(one: &Found) -> String {
    let how = match (one.forwarded, one.by) {
        (Forwarded::No, _) => return "no".to_owned(),
        (Forwarded::Off, _) => return "off".to_owned(),
        (Forwarded::Yes, Some(FoundBy::Name)) => "attached",
        (Forwarded::Yes, Some(FoundBy::Label)) => "by label",
        (Forwarded::Yes, Some(FoundBy::All)) => "as all are",
        (Forwarded::Yes, None) => "registered",
    };
    match one.registered.as_ref().filter(|registered| **registered != one.name) {
        Some(other) => format!("{how}, as {other}"),
        None => how.to_owned(),
    }
}

/// One row a port; a container without ports has one for itself.
fn listing(containers: &[Container]) -> String {
    let mut rows = Vec::new();
    for Container { state, .. } in containers {
        let name = &state.container_name;
        // A container that is reached has something to say only where that is by no faster way.
        if state.forwards.is_empty() || state.state == Reachability::Unreachable || state.reason.is_some() {
            let [none1, none2, none3, none4, none5, none6] = [NOTHING; 6].map(str::to_owned);
            let why = match (state.state, &state.attach_method, state.reason.clone().unwrap_or_default()) {
                (Reachability::Reached, Some(attach_method), why) if !why.is_empty() => {
                    format!("{attach_method}, {why}")
                }
                (_, _, why) => why,
            };
            rows.push([
                name.clone(),
                reached(state.state).to_owned(),
                none1,
                none2,
                none3,
                none4,
                none5,
                none6,
                why,
            ]);
        }
        for forward in state.forwards.iter().map(cells).chain(omitted(state)) {
            let [port, word, host, path, process, connections, bytes, why] = forward;
            rows.push([name.clone(), word, port, host, path, process, connections, bytes, why]);
        }
    }
    without_empty_end(&table(HEADING, &rows), &rows.iter().map(|row| row[8].as_str()).collect::<Vec<_>>())
}

/// The ports of one container, for `status`.
pub(super) fn forwards(state: &ContainerState) -> String {
    let rows: Vec<_> = state.forwards.iter().map(cells).chain(omitted(state)).collect();
    let text = table(["PORT", "STATE", "HOST", "PATH", "PROCESS", "CONNS", "BYTES", "WHY"], &rows);
    without_empty_end(&text, &rows.iter().map(|row| row[7].as_str()).collect::<Vec<_>>())
}

/// A last column in which nothing stands needs no heading.
fn without_empty_end(text: &str, last: &[&str]) -> String {
    match text.split_once("  WHY") {
        Some((heading, rest)) if last.iter().all(|cell| cell.is_empty()) => {
            format!("{}{rest}", heading.trim_end())
        }
        _ => text.to_owned(),
    }
}

/// The row for the ports that have none of their own, where there are any.
fn omitted(state: &ContainerState) -> Option<[String; 8]> {
    let [host, path, process, connections, bytes] = [NOTHING; 5].map(str::to_owned);
    let why = "more ports listen without a forward than are listed".to_owned();
    let port = format!("+{}", state.omitted);
    (state.omitted > 0).then(|| [port, "omitted".to_owned(), host, path, process, connections, bytes, why])
}

fn cells(row: &ForwardRow) -> [String; 8] {
    let open = matches!(row.state, RowState::Open | RowState::Closing);
    let only = |text: String| if open { text } else { NOTHING.to_owned() };
    let process = match (&row.process, row.pid) {
        (Some(process), Some(pid)) => format!("{process}, pid {pid}"),
        (Some(process), None) => process.clone(),
        (None, _) => NOTHING.to_owned(),
    };
    let label = row.label.as_ref().map(|label| format!(" \"{label}\"")).unwrap_or_default();
    [
        format!("{}{label}", row.port),
        word(row.state).to_owned(),
        if open || row.state == RowState::Published { host(row) } else { NOTHING.to_owned() },
        only(path(row.path).to_owned()),
        process,
        only(row.connections.to_string()),
        only(ByteSize(row.bytes_up.saturating_add(row.bytes_down)).to_string()),
        row.reason.clone().or_else(|| extent(row)).unwrap_or_default(),
    ]
}

/// The address that reaches a port from the host. One that is bound to another loopback address than the usual ones answers
/// there alone.
fn host(row: &ForwardRow) -> String {
    let is_usual = |address: &IpAddr| {
        let address = address.to_canonical();
        address == Ipv4Addr::LOCALHOST || address == Ipv6Addr::LOCALHOST || address.is_unspecified()
    };
    match row.addresses.first() {
        Some(only) if !row.addresses.iter().any(is_usual) => {
            SocketAddr::new(*only, row.host_port).to_string()
        }
        _ => format!("localhost:{}", row.host_port),
    }
}

/// A dual-stack server has the port on every loopback address.
fn extent(row: &ForwardRow) -> Option<String> {
    let has_every = row.addresses.iter().any(IpAddr::is_unspecified);
    has_every.then(|| "it has this port on every loopback address".to_owned())
}

fn path(path: ForwardPath) -> &'static str {
    match path {
        ForwardPath::Relay => "relay",
        ForwardPath::Native => "native",
    }
}

pub(super) fn reached(state: Reachability) -> &'static str {
    match state {
        Reachability::Waiting => "waiting",
        Reachability::Reached => "reached",
        Reachability::Unreachable => "unreachable",
        Reachability::Off => "off",
    }
}

fn word(state: RowState) -> &'static str {
    match state {
        RowState::Opening => "opening",
        RowState::Open => "open",
        RowState::Closing => "closing",
        RowState::Failed => "failed",
        RowState::Denied => "denied",
        RowState::Published => "published",
    }
}

#[cfg(test)]
#[path = "ls_tests.rs"]
mod tests;
