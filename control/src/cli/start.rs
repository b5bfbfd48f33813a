//! `landfall start`: creates a container from a folder, runs it, and forwards its ports to localhost.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::args::StartArgs;
use super::exit::{Exit, Failure};
use super::grant;
use super::trust;
use crate::cli::daemon_client;
use crate::cli::ui::output::{Colour, Printer, Report};
use crate::daemon::discovery::labels;
use crate::daemon::http::gateway::Gateway;
use crate::daemon::rpc::client::{CallError, Client, PATIENT_BUDGET};
use crate::docker::context::TOO_LARGE;
use crate::docker::labels::ContainerLabels;
use crate::docker::rebuild::own_image;
use crate::docker::{CONTEXT_BYTES_MAX, Docker, DockerError, FOLDER_LABEL, Listed};
use crate::error::chain;
use crate::launch::devcontainer::{Devcontainer, DevcontainerFile, Exposure, exposure, exposure_of_file};
use crate::launch::{self, Image, LaunchActions, Recipe, Tokens};
use crate::model::forward_table::{ForwardRow, RowState};
use crate::model::grants::Right;
use crate::model::port_policy::PortList;
use crate::model::registration::{AttachMethod, ContainerName};
use crate::sys::held_port::HeldPort;
use crate::sys::paths::Home;
use crate::sys::processes::ProcessFact;

/// The maximum time for the daemon to listen on the gateway's address, and the interval between checks.
const GATEWAY_MAX: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Runs the verb.
pub fn start(args: &StartArgs) -> Result<Exit, Failure> {
    let folder = folder(args.folder.as_deref())?;
    let name = args.name.clone().or_else(|| launch::name_of(&folder.path)).ok_or_else(|| {
        Failure::new(Exit::Usage, format!("the name of {} is not a valid container name", folder.text))
            .hint("choose a name with --name")
    })?;
    let file = read(&folder.path)?;
    let declared = file.as_ref().map(|file| file.devcontainer.clone()).unwrap_or_default();
    let image = Image::of(&folder.path, args.image.as_deref(), &declared).map_err(|why| {
        Failure::new(Exit::Usage, why)
            .hint("add a Dockerfile or a devcontainer.json to the folder, or use --image IMAGE")
    })?;
    let runtime = super::runtime()?;
    let bytes_max = args.build_context_max.map_or(CONTEXT_BYTES_MAX, |size| size.0);
    let docker = Docker::from_environment().with_context_bytes_max(bytes_max);
    let listed = runtime.block_on(docker.containers()).map_err(|error| docker_failure(&error))?;
    if let Some(other) = listed.iter().find(|other| other.name == name) {
        return Err(exists_failure(other, &folder.text));
    }
    let home = daemon_client::home()?;
    let client = Client::new(home.socket()).within(PATIENT_BUDGET);
    let http_port = daemon_client::ensure_daemon(home.clone(), Vec::new())?.http_port;
    check_name_is_free(&client, &name)?;
    runtime.block_on(check_gateway(&client, &docker, http_port))?;
    trust::offer(&folder, &home, args.policy().is_none(), args.json)?;

    let printer = Printer::to_stdout(args.json);
    let prepared = runtime.block_on(prepare(&docker, &folder, &name, &image, printer, args.json))?;
    let stderr = Printer::to_stderr(args.json);
    // `start` sets no label about ports, so all such labels come from the image.
    let inherited = labels::read(&ContainerLabels::of_image(prepared.labels));
    inherited.own_policy.map_err(|why| Failure::new(Exit::Refused, why))?;
    for why in &inherited.warnings {
        stderr.report(&Report::Note { text: format!("image {}: {why}", prepared.image), hint: None });
    }
    let image_deny = match args.policy() {
        Some(_) => PortList::default(),
        None => inherited.image_deny,
    };
    let metadata = inherited.metadata;
    let (Exposure { policy, notes, not_used }, folder_ports) = exposure_of_file(file, |declared| {
        // A port that is named on the command line is added to the file's ports, and needs no approval.
        let declared = declared.merge(Devcontainer::forwarding(args.port.iter().copied()));
        exposure(args.policy(), None, metadata.clone(), declared).denying(&image_deny)
    });
    print_ignored_fields(&not_used, stderr);
    let built = match &image {
        Image::Built(from) => Some(from),
        Image::Named(_) => None,
    };
    let http_directory = http_directory(&home, &name)?;
    let recipe = Recipe {
        name: &name,
        folder: &folder.text,
        http_directory: &http_directory,
        image: &prepared.image,
        built,
        http_port,
    };
    let fixed = json!({
        "kind": "register", "containerName": name.as_str(), "cwd": folder.text, "way": AttachMethod::DOCKER,
        "portForward": policy.unwrap_or_default(), "portNotes": notes, "folderPorts": folder_ports,
        "challengeRequired": true, "httpSocket": true,
    });
    let mut actions = HostActions { docker: &docker, client: &client, recipe: &recipe, fixed };
    runtime.block_on(launch::start(&mut actions))?;
    if args.allow_rebuild {
        grant::grant_rights(&client, name.as_str(), &[Right::Rebuild]).map_err(|failure| Failure {
            message: format!("{name} runs without the right to rebuild: {}", failure.message),
            ..failure
        })?;
    }
    print_result(&client, &name, &prepared.image, printer, args.json);
    Ok(Exit::Ok)
}

/// A folder, as its real path.
pub(super) struct Folder {
    pub(super) path: PathBuf,
    pub(super) text: String,
}

/// Returns the given folder, or else the current one.
pub(super) fn folder(named: Option<&Path>) -> Result<Folder, Failure> {
    let named = named.unwrap_or(Path::new("."));
    let unusable = |why: &str| {
        Failure::new(Exit::Missing, format!("the folder {} cannot be used: {why}", named.display()))
    };
    let path = named.canonicalize().map_err(|error| unusable(&chain(&error)))?;
    if !path.is_dir() {
        return Err(
            unusable("it is not a directory").hint("give the folder from which to create the container")
        );
    }
    let text = path.to_str().ok_or_else(|| unusable("its path is not UTF-8"))?.to_owned();
    Ok(Folder { path, text })
}

/// Reads the folder's `devcontainer.json`, if it has one.
pub(super) fn read(folder: &Path) -> Result<Option<DevcontainerFile>, Failure> {
    Devcontainer::read(folder).map_err(|error| {
        Failure::new(Exit::Usage, error.to_string())
            .hint("correct the file; it is JSON in which comments and trailing commas are allowed")
    })
}

/// Reads the folder's `devcontainer.json` for a registration. Prints the fields that landfall ignores, and asks whether
/// the folder's files are trusted.
pub(super) fn read_for_registration(
    folder: &Folder,
    home: &Home,
    with_ports: bool,
    as_json: bool,
) -> Result<Option<DevcontainerFile>, Failure> {
    let file = read(&folder.path)?;
    let not_used = file.as_ref().map(|file| file.devcontainer.not_used()).unwrap_or_default();
    print_ignored_fields(not_used, Printer::to_stderr(as_json));
    trust::offer(folder, home, with_ports, as_json)?;
    Ok(file)
}

/// Returns the hint for a folder that is too large for a build by this verb.
pub(super) fn too_large_hint(verb: &str) -> String {
    format!(
        "list files that the image does not need in .dockerignore, or raise the limit: \
         landfall {verb} --build-context-max SIZE"
    )
}

/// Converts a [`DockerError`] to a failure.
pub(super) fn docker_failure(error: &DockerError) -> Failure {
    match error {
        DockerError::Unreachable { .. } => Failure::new(Exit::Refused, error.to_string())
            .hint("start Docker, or set DOCKER_HOST to its address; landfall doctor checks it"),
        DockerError::NoSuchContainer(_) => Failure::new(Exit::Missing, error.to_string()),
        DockerError::Refused(why) if why.contains(TOO_LARGE) => {
            Failure::new(Exit::Refused, why.as_str()).hint(too_large_hint("start"))
        }
        _ => Failure::new(Exit::Refused, error.to_string()),
    }
}

fn exists_failure(other: &Listed, folder: &str) -> Failure {
    let name = &other.name;
    let ours = other.labels.own(FOLDER_LABEL) == Some(folder);
    let (what, hint) = match (ours, other.running) {
        (true, true) => (
            format!("{name} is already running"),
            format!(
                "landfall restart {name} restarts it, with --build from a new image; landfall stop {name} removes it"
            ),
        ),
        (true, false) => (
            format!("{name} already exists, and is stopped"),
            format!("landfall restart {name} starts it unchanged; landfall stop {name} removes it"),
        ),
        (false, _) => (
            format!("another container has the name {name}"),
            "choose another --name, or remove that container; docker ps -a shows it".to_owned(),
        ),
    };
    Failure::new(Exit::Refused, what).hint(hint)
}

/// Fails if the name is registered with an attach method other than Docker and WebSocket: that registration is not
/// replaced.
fn check_name_is_free(client: &Client, name: &ContainerName) -> Result<(), Failure> {
    let Some(description) = daemon_client::describe(client)? else { return Ok(()) };
    let holder = description.containers.iter().find(|other| other.state.container_name == name.as_str());
    match holder.and_then(|holder| holder.state.attach_method.as_ref()) {
        Some(attach_method) if !attach_method.starts_with("docker") && attach_method != "websocket" => {
            let text = format!("the name {name} is in use, by {attach_method}");
            Err(Failure::new(Exit::Refused, text)
                .hint("choose another --name; landfall ls shows the names in use"))
        }
        _ => Ok(()),
    }
}

/// Returns the directory that is mounted into the container, and holds the container's socket of the daemon.
fn http_directory(home: &Home, name: &ContainerName) -> Result<String, Failure> {
    let path = home.http_directory(name);
    path.to_str().map(str::to_owned).ok_or_else(|| {
        Failure::new(Exit::Usage, format!("the path {} is not UTF-8", path.display()))
            .hint("Docker reads paths from JSON, which is UTF-8; set LANDFALL_HOME to another home")
    })
}

/// Fails if a process of another user holds the port to which the container would send its token. The daemon may get
/// the gateway's address after this verb starts, so this waits up to [`GATEWAY_MAX`] for the daemon to listen there.
async fn check_gateway(client: &Client, docker: &Docker, port: NonZeroU16) -> Result<(), Failure> {
    let until = Instant::now() + GATEWAY_MAX;
    loop {
        let described = daemon_client::describe(client)?;
        match described.and_then(|described| described.http.gateway) {
            Some(Gateway::Held { by }) => return Err(held_port_failure(&by)),
            Some(Gateway::Listening { .. } | Gateway::Elsewhere { .. }) => return Ok(()),
            Some(Gateway::Failed { .. }) | None if Instant::now() >= until => break,
            Some(Gateway::Failed { .. }) | None => tokio::time::sleep(LOOK_AGAIN).await,
        }
    }
    // Either the daemon was started with other addresses, or Docker has not reported the gateway's address to it.
    let Some(address) = docker.bridge_gateway().await else { return Ok(()) };
    match HeldPort::of_stranger(address, port).await {
        Some(by) => Err(held_port_failure(&by)),
        None => Ok(()),
    }
}

fn held_port_failure(by: &HeldPort) -> Failure {
    Failure::new(Exit::Refused, format!("{by}, and the container would send its token there")).hint(
        "end that process, or give the daemon another port: landfall down, then landfall up --http-port PORT",
    )
}

/// An image in Docker's image store, with its labels.
struct Prepared {
    image: String,
    labels: BTreeMap<String, String>,
}

async fn prepare(
    docker: &Docker,
    folder: &Folder,
    name: &ContainerName,
    image: &Image,
    printer: Printer,
    json: bool,
) -> Result<Prepared, Failure> {
    let image = match image {
        Image::Named(image) => image.clone(),
        Image::Built(from) => {
            let image = own_image(name);
            if !json {
                printer.line("build", Colour::Grey, &format!("{image}, from {}", folder.text));
            }
            docker.build(&folder.path, from, &image).await.map_err(|error| docker_failure(&error))?;
            image
        }
    };
    let labels = docker.image_labels(&image).await.map_err(|error| docker_failure(&error))?;
    Ok(Prepared { image, labels })
}

fn print_ignored_fields(not_used: &[String], printer: Printer) {
    if !not_used.is_empty() {
        let text = format!("landfall ignores these fields of devcontainer.json: {}", not_used.join(", "));
        printer.report(&Report::Note { text, hint: None });
    }
}

/// The Docker engine and the daemon, as the actions of a launch.
struct HostActions<'a> {
    docker: &'a Docker,
    client: &'a Client,
    recipe: &'a Recipe<'a>,
    /// The request to register, without the tokens.
    fixed: Value,
}

impl LaunchActions for HostActions<'_> {
    type Error = Failure;

    fn tokens(&mut self) -> Result<Tokens, Failure> {
        Tokens::fresh().map_err(|error| Failure::new(Exit::Failed, chain(&error)))
    }

    fn register(&mut self, tokens: &Tokens) -> Result<(), Failure> {
        let mut request = self.fixed.clone();
        request["restartToken"] = tokens.restart.reveal().into();
        request["brokerToken"] = tokens.broker.reveal().into();
        self.client.call(&request).map(drop).map_err(|error| daemon_client::call_failure(&error))
    }

    fn deregister(&mut self) {
        // An error is ignored: the daemon removes the registration after it finds that the container does not exist.
        let _ = deregister(self.client, self.recipe.name);
    }

    async fn run(&mut self, tokens: &Tokens) -> Result<(), Failure> {
        self.docker.run(&self.recipe.container(tokens)).await.map_err(|error| docker_failure(&error))
    }
}

/// Deregisters a container. Its grants are kept for the next container that is started from the folder.
pub(super) fn deregister(client: &Client, name: &ContainerName) -> Result<(), CallError> {
    let request = json!({ "kind": "deregister", "containerName": name.as_str(), "grants": "keep" });
    client.call(&request).map(drop)
}

fn print_result(client: &Client, name: &ContainerName, image: &str, printer: Printer, as_json: bool) {
    let described = daemon_client::describe(client).ok().flatten();
    let containers = described.into_iter().flat_map(|described| described.containers);
    let own = containers.into_iter().find(|container| container.state.container_name == name.as_str());
    let (grants, rows) = own.map(|own| (own.grants, own.state.forwards)).unwrap_or_default();
    let rows: Vec<ForwardRow> = rows.into_iter().filter(|row| row.state == RowState::Open).collect();
    if as_json {
        let ports: Vec<u16> = rows.iter().map(|row| row.host_port).collect();
        let value = json!({ "started": name, "image": image, "forwardedPorts": ports, "grants": grants });
        printer.print(&value.to_string());
        return;
    }
    printer.line("start", Colour::Green, &format!("{name} runs, from {image}; landfall ls shows its ports"));
    if !grants.is_empty() {
        grant::show(printer, false, name.as_str(), &grants);
    }
    for row in rows.into_iter().filter(|row| !row.silent) {
        let process = row.process.zip(row.pid).map(|(name, pid)| ProcessFact { name, pid });
        let Some(port) = NonZeroU16::new(row.host_port) else { continue };
        printer.report(&Report::Forward {
            port,
            name: name.to_string(),
            process,
            label: row.label,
            path: row.path,
        });
    }
}
