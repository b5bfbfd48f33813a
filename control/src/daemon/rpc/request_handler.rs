//! What is answered to a request, whichever way it came (wire specification, A.1.4).
//!
//! An answer may have something behind it: a restart that begins, or the daemon's own stop. Neither may show before the
//! caller has its answer, so it travels with the answer as [`FollowUp`] and happens when the transport has written that.

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

/// What a daemon that has begun to stop answers to everything but `shutdown`.
const STOPPING: &str = "daemon stopping";

/// What a request is answered with.
#[derive(Debug)]
pub enum Answer {
    /// One response, and the end.
    Once(Response, FollowUp),
    /// The response that it worked, and then the reports of a sandbox's supervisor are read.
    Native(NativeLink),
    /// The response that it worked, and then every event: of one container, or all.
    Follow(broadcast::Receiver<Arc<str>>, Option<String>),
}

impl From<Response> for Answer {
    fn from(response: Response) -> Answer {
        Answer::Once(response, FollowUp::nothing())
    }
}

/// What happens once the answer is written, or cannot be any more: the caller may be gone, and meant it all the same.
#[derive(Default)]
pub struct FollowUp(Option<Box<dyn FnOnce() + Send>>);

impl FollowUp {
    /// Nothing.
    pub fn nothing() -> FollowUp {
        FollowUp(None)
    }

    fn of(what: impl FnOnce() + Send + 'static) -> FollowUp {
        FollowUp(Some(Box::new(what)))
    }

    /// The answer is written. Dropping does the same.
    pub fn happen(self) {
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
        f.write_str(if self.0.is_some() { "After(..)" } else { "After(nothing)" })
    }
}

/// Who answers: the parts of the daemon that requests are about.
pub struct RequestHandler {
    /// Where the daemon's files are.
    pub home: Home,
    /// The version that it was started with.
    pub version: String,
    /// The HTTP port that is bound.
    pub http_port: NonZeroU16,
    /// Whether containers reach the HTTP endpoint, and the holders of ports that it did not get.
    pub http_facts: SharedFacts,
    /// Whether what answers on the host is offered on the tailnet.
    pub tailscale: bool,
    /// How servers under `run` listen by default.
    pub sockets: Sockets,
    /// What enters containers where the daemon may not.
    pub helper: Helper,
    /// What it knows.
    pub registry: Registry,
    /// The files of folders that the user approved.
    pub approvals: Approvals,
    /// What it forwards.
    pub forwarding: Forwarding,
    /// Who finds containers.
    pub discovery: Discovery,
    /// Who restarts; nobody where the daemon was started without.
    pub supervisor: Option<Supervisor>,
    /// What happens.
    pub journal: Journal,
    /// How it is told to stop.
    pub stop: StopSwitch,
}

impl RequestHandler {
    /// Waits until a request may be answered: some need to know the registrations of the last daemon.
    pub async fn ready_for(&self, request: &Request) {
        if request.waits_for_replay() && !self.stop.is_pulled() {
            self.registry.replayed().await;
        }
    }

    /// Answers a request that came over the socket, where everything may be asked, and that it is ready for.
    pub async fn answer(&self, request: Request) -> Answer {
        if self.stop.is_pulled() && !matches!(request, Request::Shutdown { .. }) {
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
                let granted = self.registry.grant(&container_name, rights).await;
                self.granted(&container_name, granted).into()
            }
            Request::Revoke { container_name, what } => {
                let revoked = self.registry.revoke(container_name.clone(), what).await;
                self.granted(container_name.as_str(), revoked).into()
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

    /// Answers a restart. `asker` is the container itself, where that is who asks.
    pub async fn restart(&self, restart: &Restart, asker: Option<&Arc<Registration>>) -> Answer {
        match self.promise_restart(restart, asker).await {
            Ok(answer) => answer,
            Err(reason) => Response::Refused(reason).into(),
        }
    }

    /// The checks stand in the order in which the wire wants them.
    async fn promise_restart(
        &self,
        restart: &Restart,
        asker: Option<&Arc<Registration>>,
    ) -> Result<Answer, String> {
        let supervisor = self.supervisor.as_ref().ok_or(NOT_ENABLED)?;
        let build = restart.build().map_err(|error| error.to_string())?;
        let name = restart.container_name().map_err(|error| error.to_string())?;
        let registration = match asker {
            Some(asker) => Arc::clone(asker),
            None => Arc::clone(self.registry.list().find(name).ok_or_else(|| not_registered(name))?),
        };
        let build = match (build, asker) {
            (false, _) => Build::No,
            (true, Some(_)) => Build::ByContainer,
            (true, None) => Build::ByUser,
        };
        supervisor.preflight(&registration, build).await.map_err(|refusal| refusal.to_string())?;
        if self.stop.is_pulled() {
            return Err(STOPPING.to_owned());
        }
        let ticket = supervisor.accept(registration, build)?;
        let response = Response::result(json!({ "containerName": name, "scheduled": true }));
        Ok(Answer::Once(response, FollowUp::of(move || ticket.begin())))
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
        match self.registry.read_folder_again(folder).await {
            Ok(containers) => Response::result(json!({ "containers": containers })),
            Err(error) => Response::refused(error),
        }
    }

    /// Answers a change of grants with those that there are now.
    fn granted(&self, name: &str, changed: Result<(), GrantError>) -> Response {
        match changed {
            Ok(()) => {
                let grants = self.grants_of(Some(name));
                Response::result(json!({ "containerName": name, "grants": grants }))
            }
            Err(error) => Response::refused(error),
        }
    }

    /// The rights of a container, where it is registered.
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
        if self.stop.ask() && !self.stop.is_pulled() {
            self.journal.record(&Event::ShutdownRequested);
        }
        let stop = self.stop.clone();
        let response = Response::result(json!({ "scheduled": true }));
        Answer::Once(response, FollowUp::of(move || stop.pull(drain_engine)))
    }

    fn version(&self) -> Response {
        let mut answer = json!({ "version": self.version });
        // A client of this build then replaces the daemon; others do not know the field.
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
                None => just_registered(name),
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

    /// The files without effect of each registration's folder, in the order of the registrations.
    async fn withheld(&self, registered: &Arc<Registered>) -> Vec<Vec<Withheld>> {
        let (registered, approvals) = (Arc::clone(registered), self.approvals.clone());
        let work = move || registered.entries.iter().map(|entry| withheld(entry, &approvals)).collect();
        // The runtime ends.
        tokio::task::spawn_blocking(work).await.unwrap_or_default()
    }
}

/// A container that forwarding has not heard of yet.
fn just_registered(name: &str) -> ContainerState {
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

/// What `describe` tells: everything there is to show, and no secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Description {
    /// The daemon's version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Its home.
    pub home: String,
    /// The HTTP port that it has.
    pub http_port: u16,
    /// Whether containers reach it, and who holds the ports that it did not get.
    #[serde(default)]
    pub http: HttpFacts,
    /// Whether what answers on the host is offered on the tailnet.
    pub tailscale: bool,
    /// How servers under `run` listen by default.
    pub sockets: Sockets,
    /// The container that enters others for the daemon, where there is to be one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub docker_helper: Option<HelperFacts>,
    /// The process that keeps the capabilities of a root daemon, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub launcher: Option<LauncherState>,
    /// Whether every container of Docker's is forwarded.
    pub all: bool,
    /// Whether the registrations of the last daemon are back.
    pub replayed: bool,
    /// The engine, where one is attached.
    pub engine: Option<EngineFacts>,
    /// Every registration, in the order in which they came.
    pub containers: Vec<DescribedContainer>,
}

/// One registration in a [`Description`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DescribedContainer {
    /// Its folder on the host.
    pub cwd: String,
    /// What makes the daemon forward it by itself, where it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found_by: Option<FoundBy>,
    /// The files of its folder that have no effect.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub withheld: Vec<Withheld>,
    /// What it may do beyond acting for itself, in force or not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grants: Vec<GrantFact>,
    /// What became of it.
    #[serde(flatten)]
    pub state: ContainerState,
}
