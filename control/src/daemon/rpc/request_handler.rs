//! Answers requests of both transports (wire specification, A.1.4).
//!
//! An answer may have a consequence: the start of a restart, or the daemon's own stop. The caller must receive the answer
//! first, so the consequence travels with the answer as [`FollowUp`] and runs after the transport has written it.

use std::num::NonZeroU16;
use std::path::Path;
use std::sync::Arc;

use futures_util::FutureExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::broadcast;

use super::protocol::{Request, Response, Restart, SecretsPatch};
use crate::daemon::discovery::{Detached, Discovery};
use crate::daemon::http::gateway::{HttpFacts, SharedFacts};
use crate::daemon::stop::StopSwitch;
use crate::daemon::supervisor::{Build, NOT_ENABLED, Supervisor};
use crate::docker::helper_container::{Helper, HelperFacts};
use crate::forwarding::driver::{Forwarding, NativeLink};
use crate::model::event::Event;
use crate::model::forward_table::{ContainerState, EngineFacts, Reachability};
use crate::model::grants::GrantFact;
use crate::model::native_sockets::{self, Sockets};
use crate::model::registration::{FoundBy, Registration};
use crate::registry::folder::{Approvals, Withheld, withheld};
use crate::registry::grants::GrantError;
use crate::registry::store::{DropReason, Registered, Registry};
use crate::sys::journal::Journal;
use crate::sys::launcher::{self, LauncherState};
use crate::sys::paths::Home;

/// The answer of a stopping daemon to each request but `shutdown`.
const STOPPING: &str = "daemon stopping";

/// The answer to a request.
#[derive(Debug)]
pub enum Answer {
    /// One response; then the connection is closed.
    Once(Response, FollowUp),
    /// A success response; then the reports of a sandbox's supervisor are read.
    Native(NativeLink),
    /// A success response; then all events are written, of one container or of all.
    Follow(broadcast::Receiver<Arc<str>>, Option<String>),
}

impl From<Response> for Answer {
    fn from(response: Response) -> Answer {
        Answer::Once(response, FollowUp::none())
    }
}

/// An action that runs after the answer was written, or could not be written. The caller may be gone; its request is valid.
#[derive(Default)]
pub struct FollowUp(Option<Box<dyn FnOnce() + Send>>);

impl FollowUp {
    /// Returns no action.
    pub fn none() -> FollowUp {
        FollowUp(None)
    }

    fn of(what: impl FnOnce() + Send + 'static) -> FollowUp {
        FollowUp(Some(Box::new(what)))
    }

    /// Runs the action. Dropping does the same.
    pub fn run(self) {
        drop(self);
    }
}

impl Drop for FollowUp {
    fn drop(&mut self) {
        if let Some(what) = self.0.take() {
            what();
        }
    }
}

impl std::fmt::Debug for FollowUp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "FollowUp(..)" } else { "FollowUp(none)" })
    }
}

/// The handler of all requests, with the parts of the daemon that they use.
pub struct RequestHandler {
    /// The home directory.
    pub home: Home,
    /// The version of the daemon at its start.
    pub version: String,
    /// The bound HTTP port.
    pub http_port: NonZeroU16,
    /// Whether containers reach the HTTP endpoint, and the processes that hold ports that it could not bind.
    pub http_facts: SharedFacts,
    /// Whether forwarded ports are offered on the tailnet.
    pub tailscale: bool,
    /// The default for how servers under `run` listen.
    pub sockets: Sockets,
    /// The helper container, through which containers are entered that the daemon cannot enter itself.
    pub helper: Helper,
    /// The registrations.
    pub registry: Registry,
    /// The files of folders that the user approved.
    pub approvals: Approvals,
    /// The forwarding of ports.
    pub forwarding: Forwarding,
    /// The discovery of containers.
    pub discovery: Discovery,
    /// The supervisor of restarts; `None` if the daemon was started without restarts.
    pub supervisor: Option<Supervisor>,
    /// The journal for events.
    pub journal: Journal,
    /// The switch that stops the daemon.
    pub stop: StopSwitch,
}

impl RequestHandler {
    /// Waits until a request may be answered: some kinds need the registrations of the previous daemon.
    pub async fn wait_until_ready(&self, request: &Request) {
        if request.waits_for_replay() && !self.stop.is_started() {
            self.registry.replayed().await;
        }
    }

    /// Answers a request of the socket, where all kinds are permitted. The caller has awaited `wait_until_ready`.
    pub async fn answer(&self, request: Request) -> Answer {
        if self.stop.is_started() && !matches!(request, Request::Shutdown { .. }) {
            return Response::refused(STOPPING).into();
        }
        match request {
            Request::Register(registration) => match self.registry.register(*registration).await {
                Ok(()) => Response::Done.into(),
                Err(error) => Response::refused(error).into(),
            },
            Request::Deregister { container_name, keep_grants } => {
                match container_name {
                    Some(name) if keep_grants => self.registry.deregister(&name, DropReason::Requested).await,
                    Some(name) => self.registry.deregister_with_grants(&name).await,
                    None => {}
                }
                Response::Done.into()
            }
            Request::Grant { container_name, rights } => {
                let grants_response = self.registry.grant(&container_name, rights).await;
                self.grants_response(&container_name, grants_response).into()
            }
            Request::Revoke { container_name, what } => {
                let revoked = self.registry.revoke(container_name.clone(), what).await;
                self.grants_response(container_name.as_str(), revoked).into()
            }
            Request::List => self.list().into(),
            Request::Status { container_name } => self.status(&container_name).into(),
            Request::Restart(restart) => self.restart(&restart, None).await,
            Request::SecretsPatch(patch) => self.patch_secrets(&patch).await.into(),
            Request::HttpInfo => Response::result(json!({ "port": self.http_port })).into(),
            Request::Version => self.version().into(),
            Request::Shutdown { drain_engine } => self.shutdown(drain_engine),
            Request::Describe => self.describe().await.into(),
            Request::Containers => self.containers().await.into(),
            Request::ReadFolder { folder } => self.read_folder(&folder).await.into(),
            Request::Detach { container_name } => self.detach(&container_name).await.into(),
            Request::Native { container_name } => self.native(&container_name),
            Request::Events { container_name } => Answer::Follow(self.journal.listen(), container_name),
        }
    }

    /// Answers a restart. `caller` is the container if it requests its own restart.
    pub async fn restart(&self, restart: &Restart, caller: Option<&Arc<Registration>>) -> Answer {
        match self.promise_restart(restart, caller).await {
            Ok(answer) => answer,
            Err(reason) => Response::Refused(reason).into(),
        }
    }

    /// Checks and promises a restart. The checks are in the order of the wire specification.
    async fn promise_restart(
        &self,
        restart: &Restart,
        caller: Option<&Arc<Registration>>,
    ) -> Result<Answer, String> {
        let supervisor = self.supervisor.as_ref().ok_or(NOT_ENABLED)?;
        let build = restart.build().map_err(|error| error.to_string())?;
        let name = restart.container_name().map_err(|error| error.to_string())?;
        let registration = match caller {
            Some(caller) => Arc::clone(caller),
            None => Arc::clone(self.registry.list().find(name).ok_or_else(|| not_registered(name))?),
        };
        let build = match (build, caller) {
            (false, _) => Build::No,
            (true, Some(_)) => Build::ByContainer,
            (true, None) => Build::ByUser,
        };
        supervisor.preflight(&registration, build).await.map_err(|refusal| refusal.to_string())?;
        if self.stop.is_started() {
            return Err(STOPPING.to_owned());
        }
        let ticket = supervisor.accept(registration, build)?;
        let response = Response::result(json!({ "containerName": name, "scheduled": true }));
        Ok(Answer::Once(response, FollowUp::of(move || ticket.start())))
    }

    /// Answers a patch of secrets.
    pub async fn patch_secrets(&self, request: &SecretsPatch) -> Response {
        let name = &request.container_name;
        match self.registry.patch_secrets(name, &request.patch).await {
            Ok(()) => Response::result(json!({ "containerName": name, "patched": true })),
            Err(error) => Response::refused(error),
        }
    }

    async fn read_folder(&self, folder: &Path) -> Response {
        match self.registry.reread_folder(folder).await {
            Ok(containers) => Response::result(json!({ "containers": containers })),
            Err(error) => Response::refused(error),
        }
    }

    /// Answers a change of grants with the resulting grants.
    fn grants_response(&self, name: &str, changed: Result<(), GrantError>) -> Response {
        match changed {
            Ok(()) => {
                let grants = self.grants_of(Some(name));
                Response::result(json!({ "containerName": name, "grants": grants }))
            }
            Err(error) => Response::refused(error),
        }
    }

    /// Returns the rights of a container, if it is registered.
    fn grants_of(&self, name: Option<&str>) -> Vec<GrantFact> {
        let registered = self.registry.list();
        let registration = name.and_then(|name| registered.find(name));
        registration.map(|registration| self.registry.grants().facts(registration)).unwrap_or_default()
    }

    async fn containers(&self) -> Response {
        match self.discovery.containers().await {
            Ok(mut containers) => {
                for one in &mut containers {
                    one.grants = self.grants_of(one.registered.as_deref());
                }
                Response::result(json!({ "containers": containers }))
            }
            Err(error) => Response::refused(error),
        }
    }

    async fn detach(&self, name: &str) -> Response {
        match self.discovery.detach(name).await {
            Ok(Detached::Forgotten(name)) => Response::result(json!({ "containerName": name, "off": false })),
            Ok(Detached::TurnedOff(name)) => Response::result(json!({ "containerName": name, "off": true })),
            Err(why) => Response::Refused(why),
        }
    }

    fn list(&self) -> Response {
        let registered = self.registry.list();
        let entry = |entry: &Arc<Registration>| json!({ "containerName": entry.container_name.as_str(), "cwd": entry.cwd });
        let registrations: Vec<Value> = registered.entries.iter().map(entry).collect();
        Response::result(json!({ "registrations": registrations }))
    }

    fn status(&self, name: &str) -> Response {
        let registered = self.registry.list();
        let Some(entry) = registered.find(name) else { return Response::refused(not_registered(name)) };
        let ports = self.forwarding.forwarded_ports(name);
        Response::result(json!({ "containerName": name, "cwd": entry.cwd, "forwardedPorts": ports }))
    }

    fn native(&self, name: &str) -> Answer {
        let registered = self.registry.list();
        let Some(entry) = registered.find(name) else {
            return Response::refused(not_registered(name)).into();
        };
        if !native_sockets::is_announced(entry) {
            return Response::refused(format!("{name} is registered without native sockets")).into();
        }
        Answer::Native(self.forwarding.native(&entry.container_name))
    }

    fn shutdown(&self, drain_engine: bool) -> Answer {
        if self.stop.request() && !self.stop.is_started() {
            self.journal.record(&Event::ShutdownRequested);
        }
        let stop = self.stop.clone();
        let response = Response::result(json!({ "scheduled": true }));
        Answer::Once(response, FollowUp::of(move || stop.start(drain_engine)))
    }

    fn version(&self) -> Response {
        let mut answer = json!({ "version": self.version });
        // A client of this build then replaces the daemon; other clients ignore the field.
        if let (Some(state @ LauncherState::Ended), Some(answer)) =
            (launcher::state(), answer.as_object_mut())
        {
            answer.insert("launcher".to_owned(), json!(state));
        }
        Response::result(answer)
    }

    async fn describe(&self) -> Response {
        let mut table = self.forwarding.table().await;
        let registered = self.registry.list();
        let mut withheld = self.withheld(&registered).await.into_iter();
        let containers = registered.entries.iter().map(|entry| {
            let name = entry.container_name.as_str();
            let found = table.containers.iter().position(|state| state.container_name == name);
            let state = match found {
                Some(index) => table.containers.swap_remove(index),
                None => waiting_state(name),
            };
            let found_by = entry.discovered.as_ref().map(|discovered| discovered.by);
            let cwd = entry.cwd.display().to_string();
            let withheld = withheld.next().unwrap_or_default();
            let grants = self.registry.grants().facts(entry);
            DescribedContainer { cwd, found_by, withheld, grants, state }
        });
        Response::result(Description {
            containers: containers.collect(),
            version: self.version.clone(),
            pid: std::process::id(),
            home: self.home.root().display().to_string(),
            http_port: self.http_port.get(),
            http: self.http_facts.now(),
            tailscale: self.tailscale,
            sockets: self.sockets,
            docker_helper: self.helper.facts(),
            launcher: launcher::state(),
            all: self.discovery.is_all(),
            replayed: self.registry.replayed().now_or_never().is_some(),
            engine: table.engine,
        })
    }

    /// Returns the files without effect of each registration's folder, in the order of the registrations.
    async fn withheld(&self, registered: &Arc<Registered>) -> Vec<Vec<Withheld>> {
        let (registered, approvals) = (Arc::clone(registered), self.approvals.clone());
        let work = move || registered.entries.iter().map(|entry| withheld(entry, &approvals)).collect();
        // An error means that the runtime shuts down.
        tokio::task::spawn_blocking(work).await.unwrap_or_default()
    }
}

/// Returns the state of a container that forwarding has not received yet.
fn waiting_state(name: &str) -> ContainerState {
    ContainerState {
        container_name: name.to_owned(),
        attach_method: None,
        state: Reachability::Waiting,
        reason: None,
        forwards: Vec::new(),
        omitted: 0,
    }
}

fn not_registered(name: &str) -> String {
    format!("not registered: {name}")
}

/// The answer to `describe`: the whole state without secrets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Description {
    /// The daemon's version.
    pub version: String,
    /// The process id.
    pub pid: u32,
    /// The home directory.
    pub home: String,
    /// The bound HTTP port.
    pub http_port: u16,
    /// Whether containers reach it, and the processes that hold ports that it could not bind.
    #[serde(default)]
    pub http: HttpFacts,
    /// Whether forwarded ports are offered on the tailnet.
    pub tailscale: bool,
    /// The default for how servers under `run` listen.
    pub sockets: Sockets,
    /// The helper container, if the daemon uses one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub docker_helper: Option<HelperFacts>,
    /// The process that keeps the capabilities of a root daemon, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub launcher: Option<LauncherState>,
    /// Whether all containers that Docker lists are forwarded.
    pub all: bool,
    /// Whether the registrations of the previous daemon are restored.
    pub replayed: bool,
    /// The engine, if one is attached.
    pub engine: Option<EngineFacts>,
    /// All registrations, in order of registration.
    pub containers: Vec<DescribedContainer>,
}

/// One registration in a [`Description`]. Clients read it, too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DescribedContainer {
    /// Its folder on the host.
    #[serde(default)]
    pub cwd: String,
    /// Why the daemon forwards it, if the daemon discovered it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found_by: Option<FoundBy>,
    /// The files of its folder that have no effect.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub withheld: Vec<Withheld>,
    /// The rights that were granted to it, in force or not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grants: Vec<GrantFact>,
    /// The state of its forwarding.
    #[serde(flatten)]
    pub state: ContainerState,
}
