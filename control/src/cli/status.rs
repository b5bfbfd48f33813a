//! `landfall status`: shows the status of the daemon or of one container.
//!
//! The basic facts come from request kinds that every daemon supports; `describe`, which only landfall's own daemon
//! supports, adds details.

use serde_json::{Map, Value, json};

use super::args::StatusArgs;
use super::exit::{Exit, Failure};
use super::grant;
use super::ls;
use super::traffic;
use super::trust;
use super::up::{describe_engine, print_helper, print_http};
use crate::cli::daemon_client::{self, Description};
use crate::cli::ui::output::{Colour, Printer};
use crate::daemon::rpc::client::{CallError, Client, PATIENT_BUDGET};
use crate::daemon::rpc::request_handler::DescribedContainer;
use crate::model::forward_table::{Reachability, RowState};
use crate::sys::launcher::LauncherState;

/// Runs the verb.
pub fn status(args: &StatusArgs) -> Result<Exit, Failure> {
    let client = daemon_client::client()?;
    match &args.name {
        None => daemon(&client, args.json),
        Some(name) => container(&client, name, args.json),
    }?;
    Ok(Exit::Ok)
}

fn daemon(client: &Client, json: bool) -> Result<(), Failure> {
    let description = daemon_client::describe(client)?;
    let ours = description.is_some();
    let description = description.map_or_else(|| describe_in_parts(client), Ok)?;
    let printer = Printer::to_stdout(json);
    let open = |container: &DescribedContainer| {
        container.state.forwards.iter().filter(|row| row.state == RowState::Open).count()
    };
    let ports: usize = description.containers.iter().map(open).sum();
    let count = description.containers.len();
    if json {
        let withheld = trust::withheld(&description.containers);
        let Description {
            version,
            pid,
            home,
            http_port,
            http,
            replayed,
            engine,
            docker_helper,
            launcher,
            ..
        } = description;
        let value = json!({
            "version": version, "pid": pid, "home": home, "httpPort": http_port, "http": http,
            "replayed": replayed, "engine": engine, "dockerHelper": docker_helper, "launcher": launcher,
            "containers": count, "forwards": ports, "withheld": withheld,
        });
        printer.print(&value.to_string());
        return Ok(());
    }
    let pid = description.pid.map(|pid| format!("pid {pid}, ")).unwrap_or_default();
    printer.line("daemon", Colour::Green, &format!("{pid}build {}", description.version));
    if let Some(home) = &description.home {
        printer.line("home", Colour::Grey, home);
    }
    let http = description.http_port.map_or_else(|| "no port".to_owned(), |port| format!("port {port}"));
    printer.line("http", Colour::Green, &http);
    print_http(printer, &description.http);
    if ours {
        printer.line("engine", Colour::Green, &describe_engine(description.engine.as_ref()));
    }
    if let Some(helper) = &description.docker_helper {
        print_helper(printer, helper);
    }
    if description.launcher == Some(LauncherState::Ended) {
        printer.line(
            "launcher",
            Colour::Yellow,
            "has ended, so containers cannot be entered; landfall up replaces the daemon",
        );
    }
    let back = if description.replayed { "" } else { "; the daemon is still loading registrations" };
    printer.line("serves", Colour::Green, &format!("containers: {count}, forwards: {ports}{back}"));
    trust::print_withheld(printer, &description.containers);
    Ok(())
}

/// Composes a description for the reference implementation, which answers `version`, `http-info` and `list` but not
/// `describe`.
fn describe_in_parts(client: &Client) -> Result<Description, Failure> {
    let ask = |kind| client.ask(kind).map_err(|error| daemon_client::call_failure(&error));
    let (version, http, list) = (ask("version")?, ask("http-info")?, ask("list")?);
    let mut described = Map::new();
    described
        .insert("version".to_owned(), version.get("version").cloned().unwrap_or_else(|| "unknown".into()));
    described.insert("httpPort".to_owned(), http.get("port").cloned().unwrap_or_default());
    described.insert("replayed".to_owned(), true.into());
    let registrations = list.get("registrations").and_then(Value::as_array).into_iter().flatten();
    let containers = registrations.map(|registration| {
        let field = |name| registration.get(name).cloned().unwrap_or_else(|| "".into());
        json!({ "containerName": field("containerName"), "cwd": field("cwd"), "state": "off", "forwards": [] })
    });
    described.insert("containers".to_owned(), containers.collect());
    serde_json::from_value(described.into()).map_err(|_| daemon_client::call_failure(&CallError::Invalid))
}

fn container(client: &Client, name: &str, json: bool) -> Result<(), Failure> {
    let asked = json!({ "kind": "status", "containerName": name });
    let answer =
        client.within(PATIENT_BUDGET).call(&asked).map_err(|error| daemon_client::call_failure(&error))?;
    let (cwd, ports) = read(&answer).map_err(|error| daemon_client::call_failure(&error))?;
    let detail = daemon_client::describe(client)?.into_iter().flat_map(|description| description.containers);
    let mut detail: Vec<DescribedContainer> =
        detail.filter(|one| one.state.container_name == name).take(1).collect();
    traffic::count(&mut detail);
    let detail = detail.pop();
    let printer = Printer::to_stdout(json);
    if json {
        let mut value = json!({ "containerName": name, "cwd": cwd, "forwardedPorts": ports });
        let state = detail.as_ref().and_then(|detail| serde_json::to_value(&detail.state).ok());
        if let (Some(Value::Object(state)), Some(value)) = (state, value.as_object_mut()) {
            value.extend(state);
        }
        if let Some(detail) = &detail {
            value["withheld"] = json!(detail.withheld);
            value["grants"] = json!(detail.grants);
        }
        printer.print(&value.to_string());
        return Ok(());
    }
    printer.line("name", Colour::Grey, name);
    printer.line("folder", Colour::Grey, &cwd);
    let words: Vec<String> = ports.iter().map(u16::to_string).collect();
    let words = if words.is_empty() { "none".to_owned() } else { words.join(", ") };
    printer.line("ports", Colour::Green, &words);
    if let Some(container) = &detail {
        trust::print_withheld_of(printer, container);
        let DescribedContainer { state, grants, .. } = container;
        if !grants.is_empty() {
            printer.line("grants", Colour::Green, &grant::describe(grants));
        }
        printer.line(
            "method",
            Colour::Grey,
            state.attach_method.as_deref().unwrap_or("none; the container is registered but not entered"),
        );
        let why = state.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        let colour = if state.state == Reachability::Unreachable { Colour::Yellow } else { Colour::Green };
        printer.line("state", colour, &format!("{}{why}", ls::reachability_name(state.state)));
        if !state.forwards.is_empty() {
            printer.print(&format!("\n{}", ls::forwards(state)));
        }
    }
    Ok(())
}

/// Reads an answer to `status`: `cwd` must be a string; missing ports are an empty list, and invalid ports are skipped
/// (wire specification, A.1.4). The ports are sorted in ascending order.
fn read(answer: &Value) -> Result<(String, Vec<u16>), CallError> {
    let cwd = answer.get("cwd").and_then(Value::as_str).ok_or(CallError::Invalid)?;
    let ports = answer.get("forwardedPorts").and_then(Value::as_array).into_iter().flatten();
    let mut ports: Vec<u16> =
        ports.filter_map(crate::model::port_policy::port_of).map(|port| port.get()).collect();
    ports.sort_unstable();
    Ok((cwd.to_owned(), ports))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_sorted_and_invalid_ports_skipped() {
        let answer = json!({ "cwd": "/w", "forwardedPorts": [5173, "x", null, 0, 70000, 3000, 8080.0] });
        assert_eq!(read(&answer).unwrap(), ("/w".to_owned(), vec![3000, 5173, 8080]));
    }

    #[test]
    fn missing_ports_are_an_empty_list() {
        assert_eq!(read(&json!({ "cwd": "/w" })).unwrap().1, Vec::<u16>::new());
        assert_eq!(read(&json!({ "cwd": "/w", "forwardedPorts": 5 })).unwrap().1, Vec::<u16>::new());
    }

    #[test]
    fn an_answer_without_a_folder_is_invalid() {
        for answer in [json!({}), json!({ "cwd": 5 }), json!({ "cwd": null }), Value::Null] {
            assert!(matches!(read(&answer), Err(CallError::Invalid)), "{answer}");
        }
    }
}
