//! `landfall register`: registers a container with the daemon, which forwards its ports.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::args::{AttachMethodArgs, RegisterArgs};
use super::exit::{Exit, Failure};
use super::start::{self, Folder};
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Printer};
use crate::daemon::rpc::client::PATIENT_BUDGET;
use crate::error::chain;
use crate::launch::devcontainer::{Devcontainer, Exposure, exposure, exposure_of_file};
use crate::model::registration::{AttachMethod, Token};
use crate::sys::processes;

/// The longest token file, in bytes; the tokens in use have 43.
const TOKEN_BYTES_MAX: u64 = 4096;

/// Runs the verb.
pub fn register(args: &RegisterArgs) -> Result<Exit, Failure> {
    let request = request(args)?;
    let client = daemon_client::client_of_running()?;
    client.within(PATIENT_BUDGET).call(&request).map_err(|error| daemon_client::call_failure(&error))?;
    let printer = Printer::to_stdout(args.json);
    if args.json {
        printer.print(&json!({ "registered": args.name }).to_string());
    } else {
        printer.line("register", Colour::Green, &format!("{} is registered", args.name));
    }
    Ok(Exit::Ok)
}

fn request(args: &RegisterArgs) -> Result<Value, Failure> {
    let cwd = args.cwd.clone().unwrap_or_else(|| PathBuf::from("."));
    let cwd = std::path::absolute(&cwd).and_then(|path| path.canonicalize()).map_err(|error| {
        Failure::new(Exit::Usage, format!("the folder {} cannot be used: {}", cwd.display(), chain(&error)))
            .hint("give the container's folder on the host with --cwd")
    })?;
    let restart = token(args.restart_token_file.as_deref(), "LANDFALL_RESTART_TOKEN")?;
    let broker = token(args.broker_token_file.as_deref(), "LANDFALL_BROKER_TOKEN")?;
    if args.attach_method.websocket && (args.ws_host_port.is_none() || broker.is_none()) {
        let what = if broker.is_none() { "a broker token" } else { "the host port" };
        return Err(Failure::new(
            Exit::Usage,
            format!("--websocket needs {what} of the container's WebSocket"),
        )
        .hint("give --ws-host-port PORT, and --broker-token-file FILE or LANDFALL_BROKER_TOKEN"));
    }
    let attach_method = attach_method(&args.attach_method)?;
    let text = cwd.to_str().ok_or_else(|| {
        Failure::new(Exit::Usage, format!("the path {} is not UTF-8", cwd.display()))
            .hint("the daemon reads paths from JSON, which is UTF-8")
    })?;
    // This is the last step, since it may ask the user a question.
    let folder = Folder { path: cwd.clone(), text: text.to_owned() };
    let (home, options) = (daemon_client::home()?, args.options());
    let file = start::read_for_registration(&folder, &home, options.is_none(), args.json)?;
    // Only the daemon can find out whether the container exists and which labels it has, so labels are not considered
    // here.
    let (Exposure { policy, notes, .. }, folder_ports) =
        exposure_of_file(file, |declared| exposure(options.clone(), None, Devcontainer::default(), declared));
    let policy = policy.or_else(|| args.default_policy());
    let mut request = Map::new();
    request.insert("kind".to_owned(), "register".into());
    request.insert("containerName".to_owned(), args.name.as_str().into());
    request.insert("cwd".to_owned(), text.into());
    let mut add = |name: &str, value: Option<Value>| {
        request.extend(value.map(|value| (name.to_owned(), value)));
    };
    add("restartToken", restart.map(|token| token.reveal().into()));
    add("brokerToken", broker.map(|token| token.reveal().into()));
    add("wsHostPort", args.ws_host_port.map(|port| port.get().into()));
    add("portForward", policy.and_then(|policy| serde_json::to_value(policy).ok()));
    add(
        "portNotes",
        Some(notes).filter(|notes| !notes.is_empty()).and_then(|notes| serde_json::to_value(notes).ok()),
    );
    add("folderPorts", folder_ports.and_then(|ports| serde_json::to_value(ports).ok()));
    add("way", attach_method.and_then(|attach_method| serde_json::to_value(attach_method).ok()));
    Ok(Value::Object(request))
}

fn attach_method(args: &AttachMethodArgs) -> Result<Option<AttachMethod>, Failure> {
    if let Some(pid) = args.pid {
        return process(pid).map(Some);
    }
    if let Some(path) = &args.netns {
        return netns(path).map(Some);
    }
    if let Some(directory) = &args.agent {
        return agent(directory).map(Some);
    }
    if args.websocket {
        return Ok(Some(AttachMethod::Websocket));
    }
    Ok(args.docker.then_some(AttachMethod::DOCKER))
}

/// Returns the attach method for an agent in a directory. The directory has to exist; the agent may start later.
fn agent(directory: &Path) -> Result<AttachMethod, Failure> {
    let unusable = |why: &str| {
        Failure::new(Exit::Missing, format!("the directory {} cannot be used: {why}", directory.display()))
            .hint("create it on the host, and mount it into the container; `landfall agent` creates its socket there")
    };
    let path = std::path::absolute(directory).map_err(|error| unusable(&chain(&error)))?;
    let found = path.metadata().map_err(|error| unusable(&chain(&error)))?;
    if !found.is_dir() {
        return Err(unusable("it is not a directory"));
    }
    Ok(AttachMethod::Agent { directory: path })
}

/// Returns the attach method for a namespace file whose path refers to the same file in the daemon.
pub(super) fn netns(path: &Path) -> Result<AttachMethod, Failure> {
    let path = std::path::absolute(path).and_then(|path| path.metadata().map(|_| path)).map_err(|error| {
        Failure::new(Exit::Missing, format!("{} cannot be used: {}", path.display(), chain(&error)))
            .hint("`ip netns list` shows namespaces by name; their files are in /run/netns")
    })?;
    if ["/proc/self", "/proc/thread-self"].iter().any(|own| path.starts_with(own)) {
        return Err(Failure::new(
            Exit::Usage,
            format!("{} refers to another namespace in the daemon", path.display()),
        )
        .hint("name the process: /proc/PID/ns/net, or --pid PID"));
    }
    Ok(AttachMethod::Netns { path })
}

/// Returns the attach method for a running process. Its start time excludes a later process with the same id.
pub(super) fn process(pid: std::num::NonZeroU32) -> Result<AttachMethod, Failure> {
    let missing = || {
        Failure::new(Exit::Missing, format!("process {pid} does not exist"))
            .hint("give the id of a running process, as ps shows it")
    };
    let started = processes::started(pid)
        .map_err(|why| Failure::new(Exit::Failed, format!("cannot inspect process {pid}: {why}")))?;
    started.map(|started| AttachMethod::Process { pid, started: Some(started) }).ok_or_else(missing)
}

/// Returns a token from a file, or else from the environment. Errors do not contain the token.
fn token(file: Option<&Path>, variable: &str) -> Result<Option<Token>, Failure> {
    let Some(path) = file else {
        return Ok(std::env::var(variable).ok().and_then(|text| Token::new(text.trim())));
    };
    let unusable = |why: &str| {
        Failure::new(Exit::Usage, format!("the token file {} cannot be used: {why}", path.display()))
            .hint("it holds the token on one line, and nothing else")
    };
    let length = path.metadata().map_err(|error| unusable(&chain(&error)))?.len();
    if length > TOKEN_BYTES_MAX {
        return Err(unusable(&format!("it is longer than {TOKEN_BYTES_MAX} bytes")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| unusable(&chain(&error)))?;
    let text = text.trim();
    if text.contains(char::is_whitespace) {
        return Err(unusable("it holds spaces or several lines"));
    }
    Token::new(text).map(Some).ok_or_else(|| unusable("it is empty"))
}
