//! `landfall status`: how the daemon is, or one container.
//!
//! What is asked of any daemon is asked by the kinds that any daemon knows; what only ours tells comes on top.

use serde_json::{Map, Value, json};

use super::args::StatusArgs;
use super::exit::{Exit, Failure};
use super::grant;
use super::ls;
use super::traffic;
use super::trust;
use super::up::{engine_in_words, tell_helper, tell_http};
use crate::cli::daemon_client::{self, Container, Description};
use crate::cli::ui::output::{Colour, Talk};
use crate::daemon::rpc::client::{CallError, Client, PATIENT_BUDGET};
use crate::model::forward_table::{Reachability, RowState};
use crate::sys::launcher::LauncherState;

/// Tells how the daemon is, or one container.
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
    let description = description.map_or_else(|| ask_in_parts(client), Ok)?;
    let talk = Talk::to_stdout(json);
    let open = |container: &Container| {
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
        let told = json!({
            "version": version, "pid": pid, "home": home, "httpPort": http_port, "http": http,
            "replayed": replayed, "engine": engine, "dockerHelper": docker_helper, "launcher": launcher,
            "containers": count, "forwards": ports, "withheld": withheld,
        });
        talk.plain(&told.to_string());
        return Ok(());
    }
    let pid = description.pid.map(|pid| format!("pid {pid}, ")).unwrap_or_default();
    talk.line("daemon", Colour::Green, &format!("{pid}build {}", description.version));
    if let Some(home) = &description.home {
        talk.line("home", Colour::Grey, home);
    }
    let http = description.http_port.map_or_else(|| "no port".to_owned(), |port| format!("port {port}"));
    talk.line("http", Colour::Green, &http);
    tell_http(talk, &description.http);
    if ours {
        talk.line("engine", Colour::Green, &engine_in_words(description.engine.as_ref()));
    }
    if let Some(helper) = &description.docker_helper {
        tell_helper(talk, helper);
    }
    if description.launcher == Some(LauncherState::Ended) {
        talk.line(
            "launcher",
            Colour::Yellow,
            "has ended: no container can be entered; landfall up replaces the daemon",
        );
    }
    let back = if description.replayed { "" } else { "; those of the last daemon are on their way back" };
    talk.line("serves", Colour::Green, &format!("containers: {count}, forwards: {ports}{back}"));
    trust::print_withheld(talk, &description.containers);
    Ok(())
}

/// The reference has no answer that holds everything.
fn ask_in_parts(client: &Client) -> Result<Description, Failure> {
    let ask = |kind| client.ask(kind).map_err(|error| daemon_client::failed(&error));
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
    serde_json::from_value(described.into()).map_err(|_| daemon_client::failed(&CallError::Invalid))
}

fn container(client: &Client, name: &str, json: bool) -> Result<(), Failure> {
    let asked = json!({ "kind": "status", "containerName": name });
    let answer = client.within(PATIENT_BUDGET).call(&asked).map_err(|error| daemon_client::failed(&error))?;
    let (cwd, ports) = read(&answer).map_err(|error| daemon_client::failed(&error))?;
    let detail = daemon_client::describe(client)?.into_iter().flat_map(|description| description.containers);
    let mut detail: Vec<Container> = detail.filter(|one| one.state.container_name == name).take(1).collect();
    traffic::count(&mut detail);
    let detail = detail.pop();
    let talk = Talk::to_stdout(json);
    if json {
        let mut told = json!({ "containerName": name, "cwd": cwd, "forwardedPorts": ports });
        let state = detail.as_ref().and_then(|detail| serde_json::to_value(&detail.state).ok());
        if let (Some(Value::Object(state)), Some(told)) = (state, told.as_object_mut()) {
            told.extend(state);
        }
        if let Some(detail) = &detail {
            told["withheld"] = json!(detail.withheld);
            told["grants"] = json!(detail.grants);
        }
        talk.plain(&told.to_string());
        return Ok(());
    }
    talk.line("name", Colour::Grey, name);
    talk.line("folder", Colour::Grey, &cwd);
    let words: Vec<String> = ports.iter().map(u16::to_string).collect();
    let words = if words.is_empty() { "none".to_owned() } else { words.join(", ") };
    talk.line("ports", Colour::Green, &words);
    if let Some(container) = &detail {
        trust::print_withheld_of(talk, container);
        let Container { state, grants, .. } = container;
        if !grants.is_empty() {
            talk.line("grants", Colour::Green, &grant::in_words(grants));
        }
        talk.line(
            "way",
            Colour::Grey,
            state.attach_method.as_deref().unwrap_or("none; it is only remembered"),
        );
        let why = state.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        let colour = if state.state == Reachability::Unreachable { Colour::Yellow } else { Colour::Green };
        talk.line("state", colour, &format!("{}{why}", ls::reached(state.state)));
        if !state.forwards.is_empty() {
            talk.plain(&format!("\n{}", ls::forwards(state)));
        }
    }
    Ok(())
}

/// What a client takes from an answer to `status`: `cwd` must be a string; ports that are missing are none, and what is
/// no port among them is left out (wire specification, A.1.4). Ascending.
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
    fn ports_are_shown_ascending_and_what_is_none_is_left_out() {
        let answer = json!({ "cwd": "/w", "forwardedPorts": [5173, "x", null, 0, 70000, 3000, 8080.0] });
        assert_eq!(read(&answer).unwrap(), ("/w".to_owned(), vec![3000, 5173, 8080]));
    }

    #[test]
    fn missing_ports_are_none() {
        assert_eq!(read(&json!({ "cwd": "/w" })).unwrap().1, Vec::<u16>::new());
        assert_eq!(read(&json!({ "cwd": "/w", "forwardedPorts": 5 })).unwrap().1, Vec::<u16>::new());
    }

    #[test]
    fn an_answer_without_a_folder_is_none() {
        for answer in [json!({}), json!({ "cwd": 5 }), json!({ "cwd": null }), Value::Null] {
            assert!(matches!(read(&answer), Err(CallError::Invalid)), "{answer}");
        }
    }
}
