//! `landfall attach NAME`: the daemon forwards a container of Docker's from now on, and remembers that it is to.

use std::num::NonZeroU16;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::cli::args::{AttachArgs, Ring};
use crate::cli::daemon_client::{self, Container};
use crate::cli::exit::{Exit, Failure};
use crate::cli::start::{self, Folder};
use crate::cli::ui::output::{Colour, Report, Talk};
use crate::daemon::discovery::report::{Forwarded, Found};
use crate::daemon::rpc::client::{Client, PATIENT_BUDGET};
use crate::error::chain;
use crate::launch::devcontainer::{self, Exposure, exposure, exposure_of_file};
use crate::model::forward_table::{ForwardRow, Reachability, RowState};
use crate::model::port_policy::{PortForward, PortList};
use crate::model::registration::{AttachMethod, ContainerName, Discovered, FoundBy};
use crate::registry::folder::FOREGROUND;
use crate::sys::processes::ProcessFact;

/// How long the daemon may take to reach a container that runs, and its ports to settle. It takes milliseconds.
const REACH_MAX: Duration = Duration::from_secs(5);
/// How long a container in which nothing listens is looked at before that is believed: what listens is known a moment after
/// it is entered.
const LISTEN_MAX: Duration = Duration::from_millis(250);
/// How often that is looked at.
const POLL: Duration = Duration::from_millis(5);

/// Attaches, and tells what is forwarded of it now.
pub(super) fn attach(container: &ContainerName, args: &AttachArgs) -> Result<Exit, Failure> {
    if args.common.no_daemon || args.common.ring != Ring::Auto {
        return Err(Failure::new(Exit::Usage, "a container of Docker's is forwarded by the daemon")
            .hint("leave out --no-daemon and --ring, or attach to its process with --pid"));
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
        client.within(PATIENT_BUDGET).call(&request).map_err(|error| daemon_client::failed(&error))?;
    }
    tell(args, &found, &name, wait_until_reached(&client, &name, found.running)?)
}

/// The container of this name.
fn find(client: &Client, name: &ContainerName) -> Result<Found, Failure> {
    let found = daemon_client::containers(client)?.into_iter().find(|found| found.name == name.as_str());
    found.ok_or_else(|| {
        Failure::new(Exit::Missing, format!("Docker has no container {name}"))
            .hint("landfall ls --all shows what it has")
    })
}

/// What somebody registered is forwarded as they said.
fn refuse_change(args: &AttachArgs, name: &str) -> Result<(), Failure> {
    let common = &args.common;
    if common.allow.is_none() && common.deny.is_none() && common.name.is_none() && args.cwd.is_none() {
        return Ok(());
    }
    Err(Failure::new(Exit::Refused, format!("{name} is registered already, and stays as it is"))
        .hint(format!("landfall deregister {name}, and attach then")))
}

/// The request to remember it, with what [`exposure`] makes of all that is said of its ports.
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
            .hint("say which of its ports with --allow or --deny, or mend the label"));
    }
    let own = found.port_forward.as_ref().map(PortForward::from_value).transpose();
    let own = own.map_err(|error| daemon_client::other_build(&error))?;
    let metadata =
        found.devcontainer.as_ref().map(|said| devcontainer::from_metadata(&said.to_string(), None));
    let metadata =
        metadata.transpose().map_err(|error| daemon_client::other_build(&error))?.unwrap_or_default();
    let file = match &folder {
        Some(folder) => {
            start::read_for_registration(folder, &daemon_client::home()?, options.is_none(), common.json)?
        }
        None => None,
    };
    let image_deny = found.image_deny.as_deref().filter(|_| options.is_none()).map(str::parse).transpose();
    let image_deny: PortList =
        image_deny.map_err(|error| daemon_client::other_build(&error))?.unwrap_or_default();
    let (Exposure { policy, notes, .. }, folder_ports) = exposure_of_file(file, |said| {
        exposure(options.clone(), own.clone(), metadata.clone(), said).denying(&image_deny)
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

/// Waits until what listens in the container is known and forwarded, or cannot be, or there is nothing to wait for.
fn wait_until_reached(client: &Client, name: &str, running: bool) -> Result<Option<Container>, Failure> {
    let deadline = Instant::now() + REACH_MAX;
    let mut reached = None;
    loop {
        let containers = daemon_client::described(client)?.containers;
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

fn tell(args: &AttachArgs, found: &Found, name: &str, own: Option<Container>) -> Result<Exit, Failure> {
    let talk = Talk::to_stdout(args.common.json);
    let Some(Container { state, .. }) = own else {
        return Err(Failure::new(
            Exit::Refused,
            format!("{name} was attached, and somebody deregistered it"),
        ));
    };
    let exit = if state.state == Reachability::Unreachable { Exit::Refused } else { Exit::Ok };
    if args.common.json {
        let mut told = json!({ "attached": name, "container": found.name, "running": found.running });
        if let (Some(told), Ok(Value::Object(state))) = (told.as_object_mut(), serde_json::to_value(&state)) {
            told.extend(state);
        }
        talk.plain(&told.to_string());
        return Ok(exit);
    }
    let what = match state.state {
        Reachability::Unreachable => "is remembered",
        _ => "is forwarded whenever it runs",
    };
    talk.line("attached", Colour::Green, &format!("{name} {what}"));
    let why = state.reason.clone();
    match state.state {
        Reachability::Reached if state.forwards.is_empty() => {
            note(talk, "nothing listens in it just now; what will is forwarded at once".to_owned());
        }
        Reachability::Reached => {}
        Reachability::Unreachable => {
            let why = why.unwrap_or_else(|| "it cannot be entered".to_owned());
            let text = format!("{name} is not reached: {why}");
            talk.report(&Report::Warning { text, hint: None });
        }
        Reachability::Off => note(talk, "its ports are all denied".to_owned()),
        Reachability::Waiting if !found.running => note(talk, "it does not run just now".to_owned()),
        Reachability::Waiting => {
            let why = why.map(|why| format!(": {why}")).unwrap_or_default();
            note(talk, format!("it is not reached yet{why}"));
        }
    }
    for row in state.forwards.into_iter().filter(|row| !(row.silent && row.state == RowState::Open)) {
        tell_row(talk, name, row);
    }
    Ok(exit)
}

fn tell_row(talk: Talk, name: &str, row: ForwardRow) {
    let (Some(port), Some(host_port)) = (NonZeroU16::new(row.port), NonZeroU16::new(row.host_port)) else {
        return;
    };
    let process = row.process.zip(row.pid).map(|(name, pid)| ProcessFact { name, pid });
    let why = row.reason.unwrap_or_else(|| "the daemon does not say why".to_owned());
    talk.report(&match row.state {
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
            let text = format!("port {port} answers at localhost:{host_port}: {why}");
            Report::Note { text, hint: None }
        }
    });
}

fn note(talk: Talk, text: String) {
    talk.report(&Report::Note { text, hint: None });
}
