//! `landfall attach NAME`: registers a Docker container with the daemon, which forwards its ports from now on.

use std::num::NonZeroU16;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::cli::args::{AttachArgs, Ring};
use crate::cli::daemon_client;
use crate::cli::exit::{Exit, Failure};
use crate::cli::start::{self, Folder};
use crate::cli::ui::output::{Colour, Printer, Report};
use crate::daemon::discovery::report::{Forwarded, Found};
use crate::daemon::rpc::client::{Client, PATIENT_BUDGET};
use crate::daemon::rpc::request_handler::DescribedContainer;
use crate::error::chain;
use crate::launch::devcontainer::{self, Exposure, exposure, exposure_of_file};
use crate::model::forward_table::{ForwardRow, Reachability, RowState};
use crate::model::port_policy::{PortForward, PortList};
use crate::model::registration::{AttachMethod, ContainerName, Discovered, FoundBy};
use crate::registry::folder::FOREGROUND;
use crate::sys::processes::ProcessFact;

/// The maximum wait until the daemon has entered a running container and opened its ports. It takes milliseconds.
const REACH_MAX: Duration = Duration::from_secs(5);
/// The wait before a container without listeners is reported as such: its listeners are known shortly after it is
/// entered.
const LISTEN_MAX: Duration = Duration::from_millis(250);
/// The interval between requests while waiting.
const POLL: Duration = Duration::from_millis(5);

/// Attaches a container, and prints the ports that are forwarded now.
pub(super) fn attach(container: &ContainerName, args: &AttachArgs) -> Result<Exit, Failure> {
    if args.common.no_daemon || args.common.ring != Ring::Auto {
        return Err(Failure::new(Exit::Usage, "Docker containers are forwarded by the daemon")
            .hint("omit --no-daemon and --ring, or attach to a process of the container with --pid"));
    }
    let client = daemon_client::client_of_running()?;
    let found = find(&client, container)?;
    let name = match (&args.common.name, &found.registered) {
        (Some(name), _) => name.clone(),
        (None, Some(registered)) => registered.clone(),
        (None, None) => container.to_string(),
    };
    let is_anothers = found.by.is_none() && found.forwarded == Forwarded::Yes;
    if is_anothers {
        refuse_change(args, &name)?;
    } else {
        let request = request(&name, container, &found, args)?;
        client.within(PATIENT_BUDGET).call(&request).map_err(|error| daemon_client::call_failure(&error))?;
    }
    print_result(args, &found, &name, wait_until_reached(&client, &name, found.running)?)
}

/// Finds the container of this name.
fn find(client: &Client, name: &ContainerName) -> Result<Found, Failure> {
    let found = daemon_client::containers(client)?.into_iter().find(|found| found.name == name.as_str());
    found.ok_or_else(|| {
        Failure::new(Exit::Missing, format!("Docker has no container {name}"))
            .hint("landfall ls --all lists Docker containers")
    })
}

/// Fails if options would change an explicit registration.
fn refuse_change(args: &AttachArgs, name: &str) -> Result<(), Failure> {
    let common = &args.common;
    if common.allow.is_none() && common.deny.is_none() && common.name.is_none() && args.cwd.is_none() {
        return Ok(());
    }
    Err(Failure::new(Exit::Refused, format!("{name} is already registered, and was not changed"))
        .hint(format!("run landfall deregister {name}, then attach")))
}

/// Builds the request to register, with the port policy that [`exposure`] computes from all sources.
fn request(
    name: &str,
    container: &ContainerName,
    found: &Found,
    args: &AttachArgs,
) -> Result<Value, Failure> {
    let common = &args.common;
    let attach_method =
        AttachMethod::Docker { container: (container.as_str() != name).then(|| container.clone()) };
    let mut request = Map::new();
    let mut add = |field: &str, value: Value| request.insert(field.to_owned(), value);
    add("kind", "register".into());
    add("containerName", name.into());
    add("way", json!(attach_method));
    add("discovered", json!(Discovered { by: FoundBy::Name, id: Some(found.id.clone()) }));
    let folder = args.cwd.as_deref().map(folder).transpose()?;
    match &folder {
        Some(folder) => add("cwd", folder.text.as_str().into()),
        None => {
            add(FOREGROUND, true.into());
            add("cwd", "/".into())
        }
    };
    let options =
        (common.allow.is_some() || common.deny.is_some()).then(|| PortForward::from(&common.policy()));
    if let (None, Some(why)) = (&options, &found.unreadable) {
        return Err(Failure::new(Exit::Refused, format!("{container} is not attached: {why}"))
            .hint("choose its ports with --allow or --deny, or correct the label"));
    }
    let own = found.port_forward.as_ref().map(PortForward::from_value).transpose();
    let own = own.map_err(|error| daemon_client::description_failure(&error))?;
    let metadata =
        found.devcontainer.as_ref().map(|declared| devcontainer::from_metadata(&declared.to_string(), None));
    let metadata =
        metadata.transpose().map_err(|error| daemon_client::description_failure(&error))?.unwrap_or_default();
    let file = match &folder {
        Some(folder) => {
            start::read_for_registration(folder, &daemon_client::home()?, options.is_none(), common.json)?
        }
        None => None,
    };
    let image_deny = found.image_deny.as_deref().filter(|_| options.is_none()).map(str::parse).transpose();
    let image_deny: PortList =
        image_deny.map_err(|error| daemon_client::description_failure(&error))?.unwrap_or_default();
    let (Exposure { policy, notes, .. }, folder_ports) = exposure_of_file(file, |declared| {
        exposure(options.clone(), own.clone(), metadata.clone(), declared).denying(&image_deny)
    });
    if let Some(ports) = folder_ports {
        add("folderPorts", json!(ports));
    }
    if let Some(policy) = policy {
        add("portForward", json!(policy));
    }
    if !notes.is_empty() {
        add("portNotes", json!(notes));
    }
    Ok(Value::Object(request))
}

fn folder(folder: &Path) -> Result<Folder, Failure> {
    let unusable = |why: &str| {
        Failure::new(Exit::Usage, format!("the folder {} cannot be used: {why}", folder.display()))
            .hint("give the container's folder on the host with --cwd")
    };
    let path = folder.canonicalize().map_err(|error| unusable(&chain(&error)))?;
    let text = path.to_str().ok_or_else(|| unusable("its path is not UTF-8"))?.to_owned();
    Ok(Folder { path, text })
}

/// Waits until the container's listeners are known and forwarded, or it cannot be entered, or it does not run; at most
/// [`REACH_MAX`].
fn wait_until_reached(
    client: &Client,
    name: &str,
    running: bool,
) -> Result<Option<DescribedContainer>, Failure> {
    let deadline = Instant::now() + REACH_MAX;
    let mut reached = None;
    loop {
        let containers = daemon_client::require_description(client)?.containers;
        let own = containers.into_iter().find(|own| own.state.container_name == name);
        let is_settled = own.as_ref().is_some_and(|own| match own.state.state {
            Reachability::Reached if own.state.forwards.is_empty() => {
                reached.get_or_insert_with(Instant::now).elapsed() >= LISTEN_MAX
            }
            Reachability::Reached => own.state.forwards.iter().all(|row| row.state != RowState::Opening),
            Reachability::Unreachable | Reachability::Off => true,
            Reachability::Waiting => !running,
        });
        if is_settled || Instant::now() >= deadline {
            return Ok(own);
        }
        thread::sleep(POLL);
    }
}

fn print_result(
    args: &AttachArgs,
    found: &Found,
    name: &str,
    own: Option<DescribedContainer>,
) -> Result<Exit, Failure> {
    let printer = Printer::to_stdout(args.common.json);
    let Some(DescribedContainer { state, .. }) = own else {
        return Err(Failure::new(
            Exit::Refused,
            format!("{name} was attached, then deregistered by another client"),
        ));
    };
    let exit = if state.state == Reachability::Unreachable { Exit::Refused } else { Exit::Ok };
    if args.common.json {
        let mut value = json!({ "attached": name, "container": found.name, "running": found.running });
        if let (Some(value), Ok(Value::Object(state))) = (value.as_object_mut(), serde_json::to_value(&state))
        {
            value.extend(state);
        }
        printer.print(&value.to_string());
        return Ok(exit);
    }
    let what = match state.state {
        Reachability::Unreachable => "is registered",
        _ => "is forwarded whenever it runs",
    };
    printer.line("attached", Colour::Green, &format!("{name} {what}"));
    let why = state.reason.clone();
    match state.state {
        Reachability::Reached if state.forwards.is_empty() => {
            note(printer, "no port is listened on now; new listeners are forwarded at once".to_owned());
        }
        Reachability::Reached => {}
        Reachability::Unreachable => {
            let why = why.unwrap_or_else(|| "it cannot be entered".to_owned());
            let text = format!("{name} is unreachable: {why}");
            printer.report(&Report::Warning { text, hint: None });
        }
        Reachability::Off => note(printer, "all its ports are denied".to_owned()),
        Reachability::Waiting if !found.running => note(printer, "it is not running now".to_owned()),
        Reachability::Waiting => {
            let why = why.map(|why| format!(": {why}")).unwrap_or_default();
            note(printer, format!("it is not entered yet{why}"));
        }
    }
    for row in state.forwards.into_iter().filter(|row| !(row.silent && row.state == RowState::Open)) {
        print_row(printer, name, row);
    }
    Ok(exit)
}

fn print_row(printer: Printer, name: &str, row: ForwardRow) {
    let (Some(port), Some(host_port)) = (NonZeroU16::new(row.port), NonZeroU16::new(row.host_port)) else {
        return;
    };
    let process = row.process.zip(row.pid).map(|(name, pid)| ProcessFact { name, pid });
    let why = row.reason.unwrap_or_else(|| "the daemon reported no reason".to_owned());
    printer.report(&match row.state {
        RowState::Open | RowState::Closing | RowState::Opening => Report::Forward {
            port: host_port,
            name: name.to_owned(),
            process,
            label: row.label,
            path: row.path,
        },
        RowState::Failed => Report::Failed { port: host_port, detail: why },
        RowState::Denied => Report::Withheld { port, reason: why },
        RowState::Published => {
            let text = format!("port {port} answers on localhost:{host_port}: {why}");
            Report::Note { text, hint: None }
        }
    });
}

fn note(printer: Printer, text: String) {
    printer.report(&Report::Note { text, hint: None });
}
