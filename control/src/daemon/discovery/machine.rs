//! Decides which registrations exist for the containers that Docker lists. Pure: the inputs are the list, the registrations,
//! and whether all containers are forwarded; the outputs are steps, a verdict for each container, and notices for the user.
//! The decision is level-triggered: when it is repeated after the steps, no step remains.
//!
//! A container is forwarded for one of three reasons; the first that applies counts.
//!
//! - **The user named it** (`attach`). This module never drops such a registration. It updates the registration with the id
//!   of the container that has the name, and renames the registration with its container unless another container has taken
//!   the old name.
//! - **Its own label requests it**, under Docker's name or under the name of its label. A label of its image is not used.
//! - **All containers are forwarded**, except those that a label excludes.
//!
//! Registrations for the last two reasons are derived from the list alone. They are created when the container runs, since no
//! port listens before its first start, and dropped when the list no longer contains it. This module never
//! changes a registration that a client made (`register`): the registered container needs no step, and a container that only
//! requests its name does not get it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Map;

use super::labels::{self, Labels};
use crate::docker::labels::LabelOrigin;
use crate::docker::{ASIDE_SUFFIX, Listed};
use crate::model::port_policy::{Allow, PortForward};
use crate::model::registration::{AttachMethod, ContainerName, Discovered, FoundBy, Registration};
use crate::registry::folder::FOREGROUND;
use crate::registry::store::Registered;

/// A listed container with its parsed labels. They never change, and parsing the labels of many containers is slow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The container as Docker lists it.
    pub container: Listed,
    /// The parsed labels.
    pub labels: Arc<Labels>,
}

impl Candidate {
    /// Returns a candidate. Its labels are taken from `before` if that contains the same container.
    pub fn new(container: Listed, before: &[Candidate]) -> Candidate {
        let known = before
            .iter()
            .find(|known| known.container.id == container.id && known.container.labels == container.labels);
        let labels = known.map(|known| Arc::clone(&known.labels));
        let labels = labels.unwrap_or_else(|| Arc::new(labels::read(&container.labels)));
        Candidate { container, labels }
    }
}

/// A step to execute. Steps for different names may be executed in any order, and concurrently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Register a container, in place of the present registration of that name.
    Register {
        /// The new registration.
        registration: Box<Registration>,
        /// The registration of the name at the time of the decision. If it has changed since, the step has no effect.
        before: Option<Arc<Registration>>,
    },
    /// Register a container as in `Register`, and then drop the registration of the same container under its old name. In
    /// this order, observers of the registrations detect that it is the same container, and keep its ports.
    Move {
        /// The old registration; dropped unless it has been replaced since.
        from: Arc<Registration>,
        /// The new registration.
        registration: Box<Registration>,
        /// The registration of the new name at the time of the decision. If it has changed since, the step has no effect.
        before: Option<Arc<Registration>>,
    },
    /// Drop a registration, unless it has been replaced since.
    Drop(Arc<Registration>),
}

impl Step {
    /// Returns the name of the step; of a move, the new name.
    pub fn name(&self) -> &ContainerName {
        match self {
            Step::Register { registration, .. } | Step::Move { registration, .. } => {
                &registration.container_name
            }
            Step::Drop(registration) => &registration.container_name,
        }
    }

    /// Returns all names that the step changes.
    pub fn names(&self) -> impl Iterator<Item = &ContainerName> {
        let old = match self {
            Step::Move { from, .. } => Some(&from.container_name),
            Step::Register { .. } | Step::Drop(_) => None,
        };
        std::iter::once(self.name()).chain(old)
    }
}

/// The decision about one container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is forwarded under this name.
    Forwarded(ContainerName, FoundBy),
    /// The user turned it off (`detach`).
    Off(ContainerName),
    /// A client registered it. Discovery does not change that registration.
    Registered(ContainerName),
    /// It is not forwarded.
    Not(NotForwardedReason),
}

/// The reasons why a container is not forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotForwardedReason {
    /// No label, `attach` or `--all` requests it.
    NotRequested,
    /// Only a label of its image requests it, or a label that may be from the image.
    ImageLabel(LabelOrigin),
    /// It would be forwarded, but has not run since.
    NotRunning,
    /// Its label excludes it.
    Excluded,
    /// It is a container of the daemon itself.
    Helper,
    /// A label with a list of ports is invalid.
    InvalidPorts(String),
    /// Another registration has its name.
    NameTaken {
        /// The name.
        name: ContainerName,
        /// The holder of the name, as the start of a sentence: "container x has".
        holder: String,
    },
}

/// A notice for the user, reported once for each container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Notice {
    /// The container's id.
    pub id: String,
    /// A whole sentence.
    pub text: String,
}

/// The result of [`judge`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// The steps to execute.
    pub steps: Vec<Step>,
    /// One verdict for each listed container, in their order.
    pub verdicts: Vec<Verdict>,
    /// The notices to report.
    pub notices: Vec<Notice>,
}

/// Decides about all listed containers. `all` is whether all containers are forwarded.
pub fn judge(listed: &[Candidate], registered: &Registered, all: bool) -> Decision {
    let mut observation = DockerObservation::new(listed, registered, all);
    observation.update_attached();
    observation.keep_registered();
    let claims = observation.claims();
    observation.assign_names(claims);
    observation.drop_unclaimed();
    let not_requested =
        |verdict: Option<Verdict>| verdict.unwrap_or(Verdict::Not(NotForwardedReason::NotRequested));
    Decision {
        steps: join_moves(observation.steps),
        verdicts: observation.verdicts.into_iter().map(not_requested).collect(),
        notices: observation.notices,
    }
}

/// Combines a step that drops a container and a step that registers it under another name into one step that moves it.
fn join_moves(steps: Vec<Step>) -> Vec<Step> {
    let (drops, mut steps): (Vec<Step>, Vec<Step>) =
        steps.into_iter().partition(|step| matches!(step, Step::Drop(_)));
    for drop in drops {
        let Step::Drop(from) = &drop else { continue };
        let id = from.discovered.as_ref().and_then(|found| found.id.as_ref());
        let is_same = |step: &&mut Step| match step {
            Step::Register { registration, .. } => {
                id.is_some() && registration.discovered.as_ref().and_then(|found| found.id.as_ref()) == id
            }
            Step::Move { .. } | Step::Drop(_) => false,
        };
        match steps.iter_mut().find(is_same) {
            Some(step) => {
                if let Step::Register { registration, before } = step {
                    let (from, registration, before) = (from.clone(), registration.clone(), before.take());
                    *step = Step::Move { from, registration, before };
                }
            }
            None => steps.push(drop),
        }
    }
    steps
}

/// The state of one decision.
struct DockerObservation<'a> {
    listed: &'a [Candidate],
    registered: &'a Registered,
    all: bool,
    /// The name of each container. For a container that is being replaced, this differs from Docker's name; a container that
    /// is to be removed is unnamed.
    names: Vec<Option<ContainerName>>,
    verdicts: Vec<Option<Verdict>>,
    steps: Vec<Step>,
    notices: Vec<Notice>,
    /// Derived registrations that are correct, or will be after the steps.
    kept: BTreeSet<ContainerName>,
    /// The names to which registrations of the user move.
    moved_to: BTreeSet<ContainerName>,
}

/// A container that is to be forwarded because of its label, or because all containers are.
struct Claim {
    index: usize,
    by: FoundBy,
    docker_name: ContainerName,
    labels: Arc<Labels>,
}

impl<'a> DockerObservation<'a> {
    fn new(listed: &'a [Candidate], registered: &'a Registered, all: bool) -> DockerObservation<'a> {
        let present: BTreeSet<&str> = listed.iter().map(|one| one.container.name.as_str()).collect();
        // During a replacement the old container has a temporary name. It keeps its identity until the new one exists.
        let name = |Candidate { container, .. }: &Candidate| match container
            .name
            .as_str()
            .strip_suffix(ASIDE_SUFFIX)
        {
            Some(final_name) if present.contains(final_name) => None,
            Some(final_name) => ContainerName::new(final_name).ok(),
            None => Some(container.name.clone()),
        };
        DockerObservation {
            listed,
            registered,
            all,
            names: listed.iter().map(name).collect(),
            verdicts: vec![None; listed.len()],
            steps: Vec::new(),
            notices: Vec::new(),
            kept: BTreeSet::new(),
            moved_to: BTreeSet::new(),
        }
    }

    fn index_of_name(&self, name: &ContainerName) -> Option<usize> {
        self.names.iter().position(|own| own.as_ref() == Some(name))
    }

    fn set_verdict(&mut self, index: usize, verdict: Verdict) {
        if let Some(slot) = self.verdicts.get_mut(index).filter(|slot| slot.is_none()) {
            *slot = Some(verdict);
        }
    }

    fn add_notice(&mut self, index: usize, text: String) {
        if let Some(Candidate { container, .. }) = self.listed.get(index) {
            self.notices.push(Notice { id: container.id.clone(), text });
        }
    }

    /// Updates the registrations that the user made by `attach` to the containers that they mean.
    fn update_attached(&mut self) {
        for registration in &self.registered.entries {
            let Some(Discovered { by: FoundBy::Name, id }) = &registration.discovered else { continue };
            let index =
                self.index_of_name(registration.docker_name()).or_else(|| self.index_of_id(id.as_deref()));
            let Some((index, Candidate { container, .. })) =
                index.and_then(|index| Some((index, self.listed.get(index)?)))
            else {
                continue;
            };
            let name = self.update(registration, index, container);
            let is_off = registration.exposes_nothing();
            let verdict = if is_off { Verdict::Off(name) } else { Verdict::Forwarded(name, FoundBy::Name) };
            self.set_verdict(index, verdict);
        }
    }

    /// Returns the index of the container with this id, whatever its name is.
    fn index_of_id(&self, id: Option<&str>) -> Option<usize> {
        let index = self.listed.iter().position(|one| Some(one.container.id.as_str()) == id)?;
        self.names.get(index)?.is_some().then_some(index)
    }

    /// Updates a registration of the user to this container. Returns the name under which it is registered.
    fn update(
        &mut self,
        registration: &Arc<Registration>,
        index: usize,
        container: &Listed,
    ) -> ContainerName {
        let old = registration.container_name.clone();
        let Some(Some(docker_name)) = self.names.get(index).cloned() else { return old };
        let renamed = docker_name != *registration.docker_name();
        let has_docker_name = registration.docker_name() == &old;
        let new = if renamed && has_docker_name { docker_name.clone() } else { old.clone() };
        if new != old && self.is_moved(&new, &container.id) {
            self.steps.push(Step::Drop(Arc::clone(registration)));
            return new;
        }
        if new != old && !self.is_free(&new) {
            let text = format!(
                "Docker now calls {old} {new}; it stays attached as {old}, since {new} is already registered"
            );
            self.add_notice(index, text);
            return old;
        }
        let attach_method = if docker_name == new {
            AttachMethod::DOCKER
        } else {
            AttachMethod::Docker { container: Some(docker_name) }
        };
        let attach_method = if renamed { Some(attach_method) } else { registration.attach_method.clone() };
        let discovered = Some(Discovered { by: FoundBy::Name, id: Some(container.id.clone()) });
        let wanted = Registration {
            container_name: new.clone(),
            attach_method,
            discovered,
            ..Registration::clone(registration)
        };
        if new != old {
            self.moved_to.insert(new.clone());
            self.steps.push(Step::Drop(Arc::clone(registration)));
        }
        if wanted != **registration {
            let before = self.registered.find(new.as_str()).cloned();
            self.steps.push(Step::Register { registration: Box::new(wanted), before });
        }
        new
    }

    /// Returns whether the user's registration of this name is for the container of this id: an earlier move registered the
    /// new name, and only the old registration remains to be dropped.
    fn is_moved(&self, name: &ContainerName, id: &str) -> bool {
        let found = self.registered.find(name.as_str()).and_then(|other| other.discovered.as_ref());
        found.is_some_and(|found| found.by == FoundBy::Name && found.id.as_deref() == Some(id))
    }

    /// Returns whether a registration may take the name: it is unused, or its present registration is derived.
    fn is_free(&self, name: &ContainerName) -> bool {
        let derived = self.registered.find(name.as_str()).is_none_or(|other| is_derived(other));
        derived && !self.moved_to.contains(name)
    }

    /// Sets the verdict of containers that a client registered.
    fn keep_registered(&mut self) {
        for registration in &self.registered.entries {
            let is_by_name = !matches!(
                registration.attach_method,
                Some(AttachMethod::Process { .. } | AttachMethod::Netns { .. })
            );
            if registration.discovered.is_none()
                && is_by_name
                && let Some(index) = self.index_of_name(registration.docker_name())
            {
                self.set_verdict(index, Verdict::Registered(registration.container_name.clone()));
            }
        }
    }

    /// Returns the claims of the containers without a verdict, by the name that they claim.
    fn claims(&mut self) -> BTreeMap<ContainerName, Vec<Claim>> {
        let mut claims: BTreeMap<ContainerName, Vec<Claim>> = BTreeMap::new();
        for (index, Candidate { container, labels }) in self.listed.iter().enumerate() {
            for warning in &labels.warnings {
                self.add_notice(index, format!("container {}: {warning}", container.name));
            }
            if self.verdicts.get(index).is_some_and(Option::is_some) {
                continue;
            }
            match self.claim_of(index, labels) {
                Ok((name, claim)) => claims.entry(name).or_default().push(claim),
                Err(why) => self.set_verdict(index, Verdict::Not(why)),
            }
        }
        claims
    }

    fn claim_of(
        &self,
        index: usize,
        labels: &Arc<Labels>,
    ) -> Result<(ContainerName, Claim), NotForwardedReason> {
        let by = match labels.forward {
            _ if labels.is_helper => return Err(NotForwardedReason::Helper),
            Some(false) => return Err(NotForwardedReason::Excluded),
            Some(true) => FoundBy::Label,
            None if self.all => FoundBy::All,
            None => {
                return Err(labels
                    .not_own
                    .map_or(NotForwardedReason::NotRequested, NotForwardedReason::ImageLabel));
            }
        };
        if let Err(why) = &labels.own_policy {
            return Err(NotForwardedReason::InvalidPorts(why.clone()));
        }
        let docker_name = self.names.get(index).cloned().flatten().ok_or(NotForwardedReason::NotRequested)?;
        let name = labels.name.clone().unwrap_or_else(|| docker_name.clone());
        Ok((name, Claim { index, by, docker_name, labels: Arc::clone(labels) }))
    }

    /// Assigns each name to one container.
    fn assign_names(&mut self, claims: BTreeMap<ContainerName, Vec<Claim>>) {
        for (name, mut claims) in claims {
            let current = self.registered.find(name.as_str()).cloned();
            if !self.is_free(&name) {
                for claim in claims {
                    self.refuse(&claim, &name, "another registration has".to_owned());
                }
                continue;
            }
            let holder = current.as_ref().and_then(|current| current.discovered.as_ref()?.id.clone());
            let priority = |claim: &Claim| {
                let container = self.listed.get(claim.index).map(|one| &one.container);
                let holds = container.is_some_and(|container| Some(&container.id) == holder.as_ref());
                let runs = container.is_some_and(|container| container.running);
                let created = container.map_or(i64::MAX, |container| container.created);
                (!holds, !runs, created)
            };
            claims.sort_by_cached_key(priority);
            let mut claims = claims.into_iter();
            let Some(winner) = claims.next() else { continue };
            let winner_name = winner.docker_name.clone();
            self.assign(&name, winner, current);
            for claim in claims {
                self.refuse(&claim, &name, format!("container {winner_name} has"));
            }
        }
    }

    fn assign(&mut self, name: &ContainerName, claim: Claim, current: Option<Arc<Registration>>) {
        let Some(Candidate { container, .. }) = self.listed.get(claim.index) else { return };
        let known = current.as_ref().and_then(|current| current.discovered.as_ref());
        let is_same = known.is_some_and(|known| known.id.as_ref() == Some(&container.id));
        if !is_same && !container.running {
            self.set_verdict(claim.index, Verdict::Not(NotForwardedReason::NotRunning));
            return;
        }
        self.set_verdict(claim.index, Verdict::Forwarded(name.clone(), claim.by));
        self.kept.insert(name.clone());
        let mut wanted = registration(name, &claim.docker_name, &container.id, claim.by);
        wanted.port_forward.clone_from(&claim.labels.policy);
        wanted.port_notes.clone_from(&claim.labels.notes);
        if !current.as_ref().is_some_and(|current| **current == wanted) {
            self.steps.push(Step::Register { registration: Box::new(wanted), before: current });
        }
    }

    fn refuse(&mut self, claim: &Claim, name: &ContainerName, holder: String) {
        let text = format!("container {} is not forwarded: {holder} the name {name}", claim.docker_name);
        self.add_notice(claim.index, text);
        self.set_verdict(
            claim.index,
            Verdict::Not(NotForwardedReason::NameTaken { name: name.clone(), holder }),
        );
    }

    fn drop_unclaimed(&mut self) {
        for registration in self.registered.entries.iter().filter(|registration| is_derived(registration)) {
            let name = &registration.container_name;
            if !self.kept.contains(name) && !self.moved_to.contains(name) {
                self.steps.push(Step::Drop(Arc::clone(registration)));
            }
        }
    }
}

/// Returns whether a registration is derived from Docker's list alone.
fn is_derived(registration: &Registration) -> bool {
    registration.discovered.as_ref().is_some_and(|discovered| discovered.by != FoundBy::Name)
}

/// Returns a registration that the daemon derives. It has no folder of the host, since no user named one.
fn registration(name: &ContainerName, docker_name: &ContainerName, id: &str, by: FoundBy) -> Registration {
    let container = (docker_name != name).then(|| docker_name.clone());
    Registration {
        container_name: name.clone(),
        cwd: PathBuf::from("/"),
        restart_token: None,
        ws_host_port: None,
        port_forward: None,
        folder_ports: None,
        folder_ports_approved: false,
        broker_token: None,
        challenge_required: false,
        http_socket: false,
        attach_method: Some(AttachMethod::Docker { container }),
        discovered: Some(Discovered { by, id: Some(id.to_owned()) }),
        port_notes: Vec::new(),
        unknown: Map::from_iter([(FOREGROUND.to_owned(), true.into())]),
    }
}

/// The way to detach a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detach {
    /// Execute this step; no registration remains.
    Forget(Step),
    /// Execute this step; a registration remains that turns the container off.
    TurnOff(Step),
    /// It is already off.
    IsOff(ContainerName),
    /// It cannot be detached, for this reason.
    Refused(String),
}

/// Returns how to stop forwarding a container, whatever its labels are. `name` is Docker's name or that of its registration.
/// An empty list of containers is treated as if none would be forwarded automatically.
pub fn detach(name: &ContainerName, listed: &[Candidate], registered: &Registered, all: bool) -> Detach {
    let by_docker =
        || registered.entries.iter().find(|entry| entry.discovered.is_some() && entry.docker_name() == name);
    let Some(current) = registered.find(name.as_str()).or_else(by_docker) else {
        return detach_unknown(name, listed, registered, all);
    };
    let name = current.container_name.clone();
    let Some(discovered) = &current.discovered else {
        return Detach::Refused(format!("{name} was registered by name and folder; deregister it instead"));
    };
    let is_off = current.exposes_nothing();
    let without = Registered {
        entries: registered.entries.iter().filter(|entry| !Arc::ptr_eq(entry, current)).cloned().collect(),
    };
    let again = judge(listed, &without, all).verdicts;
    let comes_back = listed.iter().zip(again).any(|(one, verdict)| {
        one.container.name == *current.docker_name()
            && matches!(verdict, Verdict::Forwarded(..) | Verdict::Not(NotForwardedReason::NotRunning))
    });
    match discovered.by {
        FoundBy::Name if is_off && comes_back => Detach::IsOff(name),
        FoundBy::Name if !comes_back => Detach::Forget(Step::Drop(Arc::clone(current))),
        FoundBy::Name | FoundBy::Label | FoundBy::All => {
            let id = discovered.id.clone();
            Detach::TurnOff(turned_off(Registration::clone(current), id, Some(Arc::clone(current))))
        }
    }
}

/// Returns the same for a container that is not registered, and would be when it runs.
fn detach_unknown(name: &ContainerName, listed: &[Candidate], registered: &Registered, all: bool) -> Detach {
    let verdicts = judge(listed, registered, all).verdicts;
    let found = listed.iter().zip(verdicts).find(|(one, _)| one.container.name == *name);
    match found {
        Some((
            Candidate { container, .. },
            Verdict::Not(NotForwardedReason::NotRunning) | Verdict::Forwarded(..),
        )) => {
            let new = registration(name, name, &container.id, FoundBy::Name);
            Detach::TurnOff(turned_off(new, Some(container.id.clone()), None))
        }
        Some(_) => Detach::Refused(format!("{name} is not forwarded")),
        None => Detach::Refused(format!("not registered: {name}")),
    }
}

fn turned_off(registration: Registration, id: Option<String>, before: Option<Arc<Registration>>) -> Step {
    let nothing = PortForward { allow: Allow::Ports(BTreeSet::new()), deny: None, privileged: None };
    let registration = Registration {
        port_forward: Some(nothing),
        folder_ports: None,
        discovered: Some(Discovered { by: FoundBy::Name, id }),
        ..registration
    };
    Step::Register { registration: Box::new(registration), before }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
