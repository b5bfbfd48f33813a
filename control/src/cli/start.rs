//! `landfall start`: a folder becomes a container that runs, and what listens in it answers on localhost.

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
use crate::cli::ui::output::{Colour, Report, Talk};
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

/// The time that the daemon has to listen on the gateway, and the interval between looks.
const GATEWAY_MAX: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Starts.
pub fn start(args: &StartArgs) -> Result<Exit, Failure> {
    let folder = folder(args.folder.as_deref())?;
    let name = args.name.clone().or_else(|| launch::name_of(&folder.path)).ok_or_else(|| {
        Failure::new(Exit::Usage, format!("{} has no name that a container could have", folder.text))
            .hint("say one with --name")
    })?;
    let file = read(&folder.path)?;
    let said = file.as_ref().map(|file| file.devcontainer.clone()).unwrap_or_default();
    let image = Image::of(&folder.path, args.image.as_deref(), &said).map_err(|why| {
        Failure::new(Exit::Usage, why)
            .hint("add a Dockerfile or a devcontainer.json to the folder, or say --image IMAGE")
    })?;
    let runtime = super::runtime()?;
    let bytes_max = args.build_context_max.map_or(CONTEXT_BYTES_MAX, |size| size.0);
    let docker = Docker::from_environment().with_context_bytes_max(bytes_max);
    let listed = runtime.block_on(docker.containers()).map_err(|error| refused(&error))?;
    if let Some(other) = listed.iter().find(|other| other.name == name) {
        return Err(exists(other, &folder.text));
    }
    let home = daemon_client::home()?;
    let client = Client::new(home.socket()).within(PATIENT_BUDGET);
    let http_port = daemon_client::ensured(home.clone(), Vec::new())?.http_port;
    is_free(&client, &name)?;
    runtime.block_on(gateway_is_ours(&client, &docker, http_port))?;
    trust::offer(&folder, &home, args.policy().is_none(), args.json)?;

    let talk = Talk::to_stdout(args.json);
    let prepared = runtime.block_on(prepare(&docker, &folder, &name, &image, talk, args.json))?;
    let aside = Talk::to_stderr(args.json);
    // The container is given no label that is about its ports, so all that there are come from the image.
    let inherited = labels::read(&ContainerLabels::of_image(prepared.labels));
    inherited.own_policy.map_err(|why| Failure::new(Exit::Refused, why))?;
    for why in &inherited.nonsense {
        aside.report(&Report::Note { text: format!("image {}: {why}", prepared.image), hint: None });
    }
    let image_deny = match args.policy() {
        Some(_) => PortList::default(),
        None => inherited.image_deny,
    };
    let metadata = inherited.metadata;
    let (Exposure { policy, notes, not_used }, folder_ports) = exposure_of_file(file, |said| {
        // A port that is named on the command line is added to the file's, and needs no approval.
        let said = said.merge(Devcontainer::forwarding(args.port.iter().copied()));
        exposure(args.policy(), None, metadata.clone(), said).denying(&image_deny)
    });
    tell_not_used(&not_used, aside);
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
        grant::give(&client, name.as_str(), &[Right::Rebuild]).map_err(|failure| Failure {
            message: format!("{name} runs without the right to rebuild: {}", failure.message),
            ..failure
        })?;
    }
    tell(&client, &name, &prepared.image, talk, args.json);
    Ok(Exit::Ok)
}

/// A folder, by its real path.
pub(super) struct Folder {
    pub(super) path: PathBuf,
    pub(super) text: String,
}

/// The folder that is named, or this one.
pub(super) fn folder(named: Option<&Path>) -> Result<Folder, Failure> {
    let named = named.unwrap_or(Path::new("."));
    let unusable = |why: &str| {
        Failure::new(Exit::Missing, format!("the folder {} cannot be used: {why}", named.display()))
    };
    let path = named.canonicalize().map_err(|error| unusable(&chain(&error)))?;
    if !path.is_dir() {
        return Err(unusable("it is no directory").hint("say the folder that the container is made of"));
    }
    let text = path.to_str().ok_or_else(|| unusable("its path is not UTF-8"))?.to_owned();
    Ok(Folder { path, text })
}

/// What the folder's `devcontainer.json` says.
pub(super) fn read(folder: &Path) -> Result<Option<DevcontainerFile>, Failure> {
    Devcontainer::read(folder).map_err(|error| {
        Failure::new(Exit::Usage, error.to_string())
            .hint("mend it; comments and trailing commas are fine, everything else is as in JSON")
    })
}

/// The same for a registration of the folder, after the question whether its files are trusted. Prints the fields that
/// landfall does not act on.
pub(super) fn read_for_registration(
    folder: &Folder,
    home: &Home,
    with_ports: bool,
    as_json: bool,
) -> Result<Option<DevcontainerFile>, Failure> {
    let file = read(&folder.path)?;
    let not_used = file.as_ref().map(|file| file.devcontainer.not_used()).unwrap_or_default();
    tell_not_used(not_used, Talk::to_stderr(as_json));
    trust::offer(folder, home, with_ports, as_json)?;
    Ok(file)
}

/// The hint where a folder is too large for a build by this verb.
pub(super) fn too_large_hint(verb: &str) -> String {
    format!(
        "name what the image does not need in .dockerignore, or raise the limit: \
         landfall {verb} --build-context-max SIZE"
    )
}

/// What people are told when Docker did not do it.
pub(super) fn refused(error: &DockerError) -> Failure {
    match error {
        DockerError::Unreachable { .. } => Failure::new(Exit::Refused, error.to_string())
            .hint("start Docker, or say where it is with DOCKER_HOST; landfall doctor looks at it"),
        DockerError::NoSuchContainer(_) => Failure::new(Exit::Missing, error.to_string()),
        DockerError::Refused(why) if why.contains(TOO_LARGE) => {
            Failure::new(Exit::Refused, why.as_str()).hint(too_large_hint("start"))
        }
        _ => Failure::new(Exit::Refused, error.to_string()),
    }
}

fn exists(other: &Listed, folder: &str) -> Failure {
    let name = &other.name;
    let ours = other.labels.own(FOLDER_LABEL) == Some(folder);
    let (what, hint) = match (ours, other.running) {
        (true, true) => (
            format!("{name} runs already"),
            format!(
                "landfall restart {name} restarts it, with --build from a new image; landfall stop {name} ends it"
            ),
        ),
        (true, false) => (
            format!("{name} is there already, stopped"),
            format!("landfall restart {name} starts it as it is; landfall stop {name} removes it"),
        ),
        (false, _) => (
            format!("another container is called {name}"),
            "say another --name, or remove it; docker ps -a shows it".to_owned(),
        ),
    };
    Failure::new(Exit::Refused, what).hint(hint)
}

/// What somebody registered under the name in another way is not replaced.
fn is_free(client: &Client, name: &ContainerName) -> Result<(), Failure> {
    let Some(description) = daemon_client::describe(client)? else { return Ok(()) };
    let holder = description.containers.iter().find(|other| other.state.container_name == name.as_str());
    match holder.and_then(|holder| holder.state.attach_method.as_ref()) {
        Some(attach_method) if !attach_method.starts_with("docker") && attach_method != "websocket" => {
            let text = format!("the name {name} is taken, by {attach_method}");
            Err(Failure::new(Exit::Refused, text).hint("say another --name; landfall ls shows what there is"))
        }
        _ => Ok(()),
    }
}

/// The directory that is mounted into the container with its socket of the daemon.
fn http_directory(home: &Home, name: &ContainerName) -> Result<String, Failure> {
    let path = home.http_directory(name);
    path.to_str().map(str::to_owned).ok_or_else(|| {
        Failure::new(Exit::Usage, format!("the path {} is not UTF-8", path.display()))
            .hint("Docker takes paths as JSON, which knows no other text; LANDFALL_HOME names another home")
    })
}

/// Refuses where another process holds the port to which the container would send its token. The daemon may learn the
/// gateway's address later than this verb, so it gets some time to listen there.
async fn gateway_is_ours(client: &Client, docker: &Docker, port: NonZeroU16) -> Result<(), Failure> {
    let until = Instant::now() + GATEWAY_MAX;
    loop {
        let described = daemon_client::describe(client)?;
        match described.and_then(|described| described.http.gateway) {
            Some(Gateway::Held { by }) => return Err(held(&by)),
            Some(Gateway::Listening { .. } | Gateway::Elsewhere { .. }) => return Ok(()),
            Some(Gateway::Failed { .. }) | None if Instant::now() >= until => break,
            Some(Gateway::Failed { .. }) | None => tokio::time::sleep(LOOK_AGAIN).await,
        }
    }
    // The daemon was started with other addresses, or Docker has not given it the gateway's address.
    let Some(address) = docker.bridge_gateway().await else { return Ok(()) };
    match HeldPort::of_stranger(address, port).await {
        Some(by) => Err(held(&by)),
        None => Ok(()),
    }
}

fn held(by: &HeldPort) -> Failure {
    Failure::new(Exit::Refused, format!("{by}, and the container would send its token there"))
        .hint("end that process, or let the daemon take another port: landfall down, and up again")
}

/// An image that is here.
struct Prepared {
    image: String,
    labels: BTreeMap<String, String>,
}

async fn prepare(
    docker: &Docker,
    folder: &Folder,
    name: &ContainerName,
    image: &Image,
    talk: Talk,
    json: bool,
) -> Result<Prepared, Failure> {
    let image = match image {
        Image::Named(image) => image.clone(),
        Image::Built(from) => {
            let image = own_image(name);
            if !json {
                talk.line("build", Colour::Grey, &format!("{image}, of {}", folder.text));
            }
            docker.build(&folder.path, from, &image).await.map_err(|error| refused(&error))?;
            image
        }
    };
    let labels = docker.image_labels(&image).await.map_err(|error| refused(&error))?;
    Ok(Prepared { image, labels })
}

fn tell_not_used(not_used: &[String], talk: Talk) {
    if !not_used.is_empty() {
        let text = format!("landfall does nothing about these of devcontainer.json: {}", not_used.join(", "));
        talk.report(&Report::Note { text, hint: None });
    }
}

/// The hands of this verb.
struct HostActions<'a> {
    docker: &'a Docker,
    client: &'a Client,
    recipe: &'a Recipe<'a>,
    /// The request to register, but for the tokens.
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
        self.client.call(&request).map(drop).map_err(|error| daemon_client::failed(&error))
    }

    fn deregister(&mut self) {
        // What is not heard of here ends when the daemon sees that there is no such container.
        let _ = deregister(self.client, self.recipe.name);
    }

    async fn run(&mut self, tokens: &Tokens) -> Result<(), Failure> {
        self.docker.run(&self.recipe.container(tokens)).await.map_err(|error| refused(&error))
    }
}

/// Has the daemon forget a container. Its grants stay for the next one that is started from the folder.
pub(super) fn deregister(client: &Client, name: &ContainerName) -> Result<(), CallError> {
    let request = json!({ "kind": "deregister", "containerName": name.as_str(), "grants": "keep" });
    client.call(&request).map(drop)
}

fn tell(client: &Client, name: &ContainerName, image: &str, talk: Talk, as_json: bool) {
    let described = daemon_client::describe(client).ok().flatten();
    let containers = described.into_iter().flat_map(|described| described.containers);
    let own = containers.into_iter().find(|container| container.state.container_name == name.as_str());
    let (grants, rows) = own.map(|own| (own.grants, own.state.forwards)).unwrap_or_default();
    let rows: Vec<ForwardRow> = rows.into_iter().filter(|row| row.state == RowState::Open).collect();
    if as_json {
        let ports: Vec<u16> = rows.iter().map(|row| row.host_port).collect();
        let told = json!({ "started": name, "image": image, "forwardedPorts": ports, "grants": grants });
        talk.plain(&told.to_string());
        return;
    }
    talk.line("start", Colour::Green, &format!("{name} runs, from {image}; landfall ls shows what answers"));
    if !grants.is_empty() {
        grant::show(talk, false, name.as_str(), &grants);
    }
    for row in rows.into_iter().filter(|row| !row.silent) {
        let process = row.process.zip(row.pid).map(|(name, pid)| ProcessFact { name, pid });
        let Some(port) = NonZeroU16::new(row.host_port) else { continue };
        talk.report(&Report::Forward {
            port,
            name: name.to_string(),
            process,
            label: row.label,
            path: row.path,
        });
    }
}
