//! `landfall ls`: lists registered containers and forwarded ports in one table.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde_json::json;

use super::args::LsArgs;
use super::exit::{Exit, Failure};
use super::traffic;
use crate::cli::daemon_client;
use crate::cli::ui::output::{Printer, Report};
use crate::cli::ui::table::{EMPTY_CELL, table};
use crate::daemon::discovery::report::{Forwarded, Found};
use crate::daemon::rpc::client::Client;
use crate::daemon::rpc::request_handler::DescribedContainer;
use crate::model::forward_table::{ContainerState, ForwardPath, ForwardRow, Reachability, RowState};
use crate::model::grants::{GrantFact, GrantState};
use crate::model::registration::FoundBy;
use crate::model::size::ByteSize;

const HEADING: [&str; 9] = ["NAME", "STATE", "PORT", "HOST", "PATH", "PROCESS", "CONNS", "BYTES", "WHY"];

/// Runs the verb.
pub fn ls(args: &LsArgs) -> Result<Exit, Failure> {
    let client = daemon_client::client()?;
    if args.all {
        return list_docker(&client, args.json);
    }
    let mut description = daemon_client::require_description(&client)?;
    traffic::count(&mut description.containers);
    let printer = Printer::to_stdout(args.json);
    if args.json {
        let value = json!({ "engine": description.engine, "containers": description.containers });
        printer.print(&value.to_string());
        return Ok(Exit::Ok);
    }
    if description.containers.is_empty() {
        let hint =
            "landfall run and landfall attach register containers; landfall ls --all lists Docker containers"
                .to_owned();
        let text = if description.replayed {
            "nothing is registered"
        } else {
            "the daemon is still loading the registrations of its predecessor"
        };
        printer.report(&Report::Note { text: text.to_owned(), hint: Some(hint) });
    } else {
        printer.print(&registered_table(&description.containers));
    }
    Ok(Exit::Ok)
}

/// Prints all Docker containers, each with the reason why it is forwarded or not.
fn list_docker(client: &Client, json: bool) -> Result<Exit, Failure> {
    let found = daemon_client::containers(client)?;
    let printer = Printer::to_stdout(json);
    if json {
        printer.print(&json!({ "containers": found }).to_string());
    } else if found.is_empty() {
        let text = "Docker has no containers".to_owned();
        printer.report(&Report::Note { text, hint: None });
    } else {
        printer.print(&docker_table(&found));
        let stderr = Printer::to_stderr(json);
        for one in &found {
            if let (Some(why), Some(hint)) = (&one.why, &one.hint) {
                let text = format!("{} is not forwarded: {why}", one.name);
                stderr.report(&Report::Note { text, hint: Some(format!("{hint} forwards it")) });
            }
        }
    }
    Ok(Exit::Ok)
}

/// Formats one row per Docker container.
fn docker_table(found: &[Found]) -> String {
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
    without_empty_last_column(&text, &rows.iter().map(|row| row[5].as_str()).collect::<Vec<_>>())
}

fn granted(one: &Found) -> String {
    let word = |fact: &GrantFact| match fact.state {
        GrantState::Granted | GrantState::Registered => fact.what.clone(),
        GrantState::Dormant => format!("{} (dormant)", fact.what),
        GrantState::Unknown => format!("{} (unknown)", fact.what),
    };
    let granted: Vec<String> = one.grants.iter().map(word).collect();
    if granted.is_empty() { EMPTY_CELL.to_owned() } else { granted.join(", ") }
}

fn forwarded(one: &Found) -> String {
    let how = match (one.forwarded, one.by) {
        (Forwarded::No, _) => return "no".to_owned(),
        (Forwarded::Off, _) => return "off".to_owned(),
        (Forwarded::Yes, Some(FoundBy::Name)) => "attached",
        (Forwarded::Yes, Some(FoundBy::Label)) => "by label",
        (Forwarded::Yes, Some(FoundBy::All)) => "by --all",
        (Forwarded::Yes, None) => "registered",
    };
    match one.registered.as_ref().filter(|registered| **registered != one.name) {
        Some(other) => format!("{how}, as {other}"),
        None => how.to_owned(),
    }
}

/// Formats one row per port, and one row for a container without ports.
fn registered_table(containers: &[DescribedContainer]) -> String {
    let mut rows = Vec::new();
    for DescribedContainer { state, .. } in containers {
        let name = &state.container_name;
        // A reached container has its own row only if a reason says why it is not reached by a faster attach method.
        if state.forwards.is_empty() || state.state == Reachability::Unreachable || state.reason.is_some() {
            let [empty1, empty2, empty3, empty4, empty5, empty6] = [EMPTY_CELL; 6].map(str::to_owned);
            let why = match (state.state, &state.attach_method, state.reason.clone().unwrap_or_default()) {
                (Reachability::Reached, Some(attach_method), why) if !why.is_empty() => {
                    format!("{attach_method}, {why}")
                }
                (_, _, why) => why,
            };
            rows.push([
                name.clone(),
                reachability_name(state.state).to_owned(),
                empty1,
                empty2,
                empty3,
                empty4,
                empty5,
                empty6,
                why,
            ]);
        }
        for forward in state.forwards.iter().map(cells).chain(omitted(state)) {
            let [port, word, host, path, process, connections, bytes, why] = forward;
            rows.push([name.clone(), word, port, host, path, process, connections, bytes, why]);
        }
    }
    without_empty_last_column(
        &table(HEADING, &rows),
        &rows.iter().map(|row| row[8].as_str()).collect::<Vec<_>>(),
    )
}

/// Formats the ports of one container, for `status`.
pub(super) fn forwards(state: &ContainerState) -> String {
    let rows: Vec<_> = state.forwards.iter().map(cells).chain(omitted(state)).collect();
    let text = table(["PORT", "STATE", "HOST", "PATH", "PROCESS", "CONNS", "BYTES", "WHY"], &rows);
    without_empty_last_column(&text, &rows.iter().map(|row| row[7].as_str()).collect::<Vec<_>>())
}

/// Removes the heading of the last column if all its cells are empty.
fn without_empty_last_column(text: &str, last: &[&str]) -> String {
    match text.split_once("  WHY") {
        Some((heading, rest)) if last.iter().all(|cell| cell.is_empty()) => {
            format!("{}{rest}", heading.trim_end())
        }
        _ => text.to_owned(),
    }
}

/// Returns the row for the ports that are not listed, if there are any.
fn omitted(state: &ContainerState) -> Option<[String; 8]> {
    let [host, path, process, connections, bytes] = [EMPTY_CELL; 5].map(str::to_owned);
    let why = "further ports are listened on, without a forward".to_owned();
    let port = format!("+{}", state.omitted);
    (state.omitted > 0).then(|| [port, "omitted".to_owned(), host, path, process, connections, bytes, why])
}

fn cells(row: &ForwardRow) -> [String; 8] {
    let open = matches!(row.state, RowState::Open | RowState::Closing);
    let only = |text: String| if open { text } else { EMPTY_CELL.to_owned() };
    let process = match (&row.process, row.pid) {
        (Some(process), Some(pid)) => format!("{process}, pid {pid}"),
        (Some(process), None) => process.clone(),
        (None, _) => EMPTY_CELL.to_owned(),
    };
    let label = row.label.as_ref().map(|label| format!(" \"{label}\"")).unwrap_or_default();
    [
        format!("{}{label}", row.port),
        state_name(row.state).to_owned(),
        if open || row.state == RowState::Published { host_address(row) } else { EMPTY_CELL.to_owned() },
        only(path_name(row.path).to_owned()),
        process,
        only(row.connections.to_string()),
        only(ByteSize(row.bytes_up.saturating_add(row.bytes_down)).to_string()),
        row.reason.clone().or_else(|| loopback_note(row)).unwrap_or_default(),
    ]
}

/// Returns the address that reaches a port from the host. A port that is bound only to an unusual loopback address
/// answers only there.
fn host_address(row: &ForwardRow) -> String {
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

/// Returns a note for a dual-stack server, which has the port on every loopback address.
fn loopback_note(row: &ForwardRow) -> Option<String> {
    let has_every = row.addresses.iter().any(IpAddr::is_unspecified);
    has_every.then(|| "it listens on every loopback address".to_owned())
}

fn path_name(path: ForwardPath) -> &'static str {
    match path {
        ForwardPath::Relay => "relay",
        ForwardPath::Native => "native",
    }
}

pub(super) fn reachability_name(state: Reachability) -> &'static str {
    match state {
        Reachability::Waiting => "waiting",
        Reachability::Reached => "reached",
        Reachability::Unreachable => "unreachable",
        Reachability::Off => "off",
    }
}

fn state_name(state: RowState) -> &'static str {
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
