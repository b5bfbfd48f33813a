//! Which registrations there are to be for the containers that Docker lists. Pure: the list, what is registered, and whether
//! everything is forwarded go in; steps, a verdict for each container and what people have to be told come out. It is a
//! level: judged again after the steps are done, there are none left.
//!
//! Three things make a container one that is forwarded; the first that holds counts.
//!
//! - **Somebody named it** (`attach`). That registration is a person's word. It is never dropped here; it is kept up to date
//!   with the id of the container that has the name, and it moves with that container to another name if nobody has taken
//!   the old one.
//! - **Its own label says so**, under Docker's name or the one of its label. A label of its image does not count.
//! - **Everything is forwarded**, but what its label excludes.
//!
//! The last two are derived from the list and from nothing else. They are made when the container runs, since one that never
//! did has nothing to forward, and dropped when the list has it no more. A registration that is somebody's own is in nobody's
//! power here: a container that it is about needs nothing, and one that only wants its name does not get it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Map;

use super::labels::{self, Labels};
use crate::docker::labels::LabelOrigin;
use crate::docker::{ASIDE, Listed};
use crate::model::port_policy::{Allow, PortForward};
use crate::model::registration::{AttachMethod, ContainerName, Discovered, FoundBy, Registration};
use crate::registry::folder::FOREGROUND;
use crate::registry::store::Registered;

/// A container of Docker's list, its labels read. They never change, and to read them takes a while where there are many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// What Docker tells of it.
    pub container: Listed,
    /// What its labels say.
    pub labels: Arc<Labels>,
}

impl Candidate {
    /// A container, as it was read before if that was among `before`.
    pub fn new(container: Listed, before: &[Candidate]) -> Candidate {
        let known = before
            .iter()
            .find(|known| known.container.id == container.id && known.container.labels == container.labels);
        let labels = known.map(|known| Arc::clone(&known.labels));
        let labels = labels.unwrap_or_else(|| Arc::new(labels::read(&container.labels)));
        Candidate { container, labels }
    }
}

/// What is to be done. Steps about different names may be done in any order, and side by side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Register, in the place of what the name stood for.
    Register {
        /// What.
        registration: Box<Registration>,
        /// What the name stood for when this was decided; if it stands for something else by now, nothing is done.
        before: Option<Arc<Registration>>,
    },
    /// Register the same way, and then forget the name under which the same container was registered. In this order, whoever
    /// follows the registrations sees that it is the same one, and keeps what it has.
    Move {
        /// What it was registered as; forgotten unless it was registered anew.
        from: Arc<Registration>,
        /// What it is registered as from now on.
        registration: Box<Registration>,
        /// What that name stood for when this was decided; if it stands for something else by now, nothing is done.
        before: Option<Arc<Registration>>,
    },
    /// Forget, unless it was registered anew.
    Drop(Arc<Registration>),
}

impl Step {
    /// The name that it is about; of two the one that is registered.
    pub fn name(&self) -> &ContainerName {
        match self {
            Step::Register { registration, .. } | Step::Move { registration, .. } => {
                &registration.container_name
            }
            Step::Drop(registration) => &registration.container_name,
        }
    }

    /// Every name that it changes.
    pub fn names(&self) -> impl Iterator<Item = &ContainerName> {
        let old = match self {
            Step::Move { from, .. } => Some(&from.container_name),
            Step::Register { .. } | Step::Drop(_) => None,
        };
        std::iter::once(self.name()).chain(old)
    }
}

/// What is decided about one container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is forwarded under this name.
    Forwarded(ContainerName, FoundBy),
    /// Somebody turned it off (`detach`).
    Off(ContainerName),
    /// Somebody registered it, and how is their business.
    Registered(ContainerName),
    /// It is not forwarded.
    Not(NotForwardedReason),
}

/// Why a container is not forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotForwardedReason {
    /// Nobody asked for it.
    Unasked,
    /// Only a label of its image asks for it, or one that may come from there.
    NotOwn(LabelOrigin),
    /// It would be, and has not run since.
    NotRunning,
    /// Its label says no.
    Excluded,
    /// It is one of the daemon's own.
    Ours,
    /// A label that says which ports cannot be read.
    Unreadable(String),
    /// Its name stands for something else.
    NameTaken {
        /// The name.
        name: ContainerName,
        /// By what.
        holder: String,
    },
}

/// Something that people are to be told, once for each container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Notice {
    /// The container's id.
    pub id: String,
    /// A whole sentence.
    pub text: String,
}

/// What came of a look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// What is to be done.
    pub steps: Vec<Step>,
    /// One for each container that was listed, in their order.
    pub verdicts: Vec<Verdict>,
    /// What is to be told.
    pub remarks: Vec<Notice>,
}

/// Judges every container. `all` is whether everything is forwarded.
pub fn judge(listed: &[Candidate], registered: &Registered, all: bool) -> Decision {
    let mut look = DockerObservation::new(listed, registered, all);
    look.follow_named();
    look.leave_what_is_registered();
    let claims = look.claims();
    look.grant(claims);
    look.drop_what_nobody_claims();
    let unasked = |verdict: Option<Verdict>| verdict.unwrap_or(Verdict::Not(NotForwardedReason::Unasked));
    Decision {
        steps: joined(look.steps),
        verdicts: look.verdicts.into_iter().map(unasked).collect(),
        remarks: look.remarks,
    }
}

/// The steps, where one that drops a container and one that registers it under another name are one that moves it.
fn joined(steps: Vec<Step>) -> Vec<Step> {
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

/// One look at everything.
struct DockerObservation<'a> {
    listed: &'a [Candidate],
    registered: &'a Registered,
    all: bool,
    /// What each container is called, which for one that is being replaced is not what Docker says. A container that is to go
    /// has none.
    names: Vec<Option<ContainerName>>,
    verdicts: Vec<Option<Verdict>>,
    steps: Vec<Step>,
    remarks: Vec<Notice>,
    /// Derived registrations that are as they are to be, or will be.
    kept: BTreeSet<ContainerName>,
    /// Names that a registration of somebody moves to.
    moved_to: BTreeSet<ContainerName>,
}

/// A container that is to be forwarded for its label, or because everything is.
struct Claim {
    at: usize,
    by: FoundBy,
    docker_name: ContainerName,
    labels: Arc<Labels>,
}

impl<'a> DockerObservation<'a> {
    fn new(listed: &'a [Candidate], registered: &'a Registered, all: bool) -> DockerObservation<'a> {
        let there: BTreeSet<&str> = listed.iter().map(|one| one.container.name.as_str()).collect();
        // While a container is replaced, the old one has another name for a moment: it is what it was until there is a new one.
        let name = |Candidate { container, .. }: &Candidate| match container.name.as_str().strip_suffix(ASIDE)
        {
            Some(meant) if there.contains(meant) => None,
            Some(meant) => ContainerName::new(meant).ok(),
            None => Some(container.name.clone()),
        };
        DockerObservation {
            listed,
            registered,
            all,
            names: listed.iter().map(name).collect(),
            verdicts: vec![None; listed.len()],
            steps: Vec::new(),
            remarks: Vec::new(),
            kept: BTreeSet::new(),
            moved_to: BTreeSet::new(),
        }
    }

    fn named(&self, name: &ContainerName) -> Option<usize> {
        self.names.iter().position(|own| own.as_ref() == Some(name))
    }

    fn settle(&mut self, at: usize, verdict: Verdict) {
        if let Some(slot) = self.verdicts.get_mut(at).filter(|slot| slot.is_none()) {
            *slot = Some(verdict);
        }
    }

    fn remark(&mut self, at: usize, text: String) {
        if let Some(Candidate { container, .. }) = self.listed.get(at) {
            self.remarks.push(Notice { id: container.id.clone(), text });
        }
    }

    /// Keeps what people named beside the containers that they meant.
    fn follow_named(&mut self) {
        for registration in &self.registered.entries {
            let Some(Discovered { by: FoundBy::Name, id }) = &registration.discovered else { continue };
            let at = self.named(registration.docker_name()).or_else(|| self.moved(id.as_deref()));
            let Some((at, Candidate { container, .. })) = at.and_then(|at| Some((at, self.listed.get(at)?)))
            else {
                continue;
            };
            let name = self.follow(registration, at, container);
            let is_off = registration.exposes_nothing();
            let verdict = if is_off { Verdict::Off(name) } else { Verdict::Forwarded(name, FoundBy::Name) };
            self.settle(at, verdict);
        }
    }

    /// The container of this id, under whatever name.
    fn moved(&self, id: Option<&str>) -> Option<usize> {
        let at = self.listed.iter().position(|one| Some(one.container.id.as_str()) == id)?;
        self.names.get(at)?.is_some().then_some(at)
    }

    /// Makes a registration of somebody that of this container; under which name that is.
    fn follow(&mut self, registration: &Arc<Registration>, at: usize, container: &Listed) -> ContainerName {
        let old = registration.container_name.clone();
        let Some(Some(docker_name)) = self.names.get(at).cloned() else { return old };
        let renamed = docker_name != *registration.docker_name();
        let has_docker_name = registration.docker_name() == &old;
        let new = if renamed && has_docker_name { docker_name.clone() } else { old.clone() };
        if new != old && self.is_moved(&new, &container.id) {
            self.steps.push(Step::Drop(Arc::clone(registration)));
            return new;
        }
        if new != old && !self.is_free(&new) {
            let text = format!(
                "{old} is called {new} by Docker now, and stays attached as it was, since {new} stands for something else"
            );
            self.remark(at, text);
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

    /// Whether the name is that of a registration of somebody for the container of this id: one that was on its way there has
    /// arrived, and is only to be forgotten where it came from.
    fn is_moved(&self, name: &ContainerName, id: &str) -> bool {
        let found = self.registered.find(name.as_str()).and_then(|other| other.discovered.as_ref());
        found.is_some_and(|found| found.by == FoundBy::Name && found.id.as_deref() == Some(id))
    }

    /// Whether a registration of somebody may have the name: nobody's does, or what is only derived.
    fn is_free(&self, name: &ContainerName) -> bool {
        let derived = self.registered.find(name.as_str()).is_none_or(|other| is_derived(other));
        derived && !self.moved_to.contains(name)
    }

    /// A container that is registered needs nothing.
    fn leave_what_is_registered(&mut self) {
        for registration in &self.registered.entries {
            let is_by_name = !matches!(
                registration.attach_method,
                Some(AttachMethod::Process { .. } | AttachMethod::Netns { .. })
            );
            if registration.discovered.is_none()
                && is_by_name
                && let Some(at) = self.named(registration.docker_name())
            {
                self.settle(at, Verdict::Registered(registration.container_name.clone()));
            }
        }
    }

    /// Who is to be forwarded under which name, of those about whom nothing is decided.
    fn claims(&mut self) -> BTreeMap<ContainerName, Vec<Claim>> {
        let mut claims: BTreeMap<ContainerName, Vec<Claim>> = BTreeMap::new();
        for (at, Candidate { container, labels }) in self.listed.iter().enumerate() {
            for what in &labels.nonsense {
                self.remark(at, format!("container {}: {what}", container.name));
            }
            if self.verdicts.get(at).is_some_and(Option::is_some) {
                continue;
            }
            match self.asked(at, labels) {
                Ok((name, claim)) => claims.entry(name).or_default().push(claim),
                Err(why) => self.settle(at, Verdict::Not(why)),
            }
        }
        claims
    }

    fn asked(&self, at: usize, labels: &Arc<Labels>) -> Result<(ContainerName, Claim), NotForwardedReason> {
        let by = match labels.forward {
            _ if labels.is_ours => return Err(NotForwardedReason::Ours),
            Some(false) => return Err(NotForwardedReason::Excluded),
            Some(true) => FoundBy::Label,
            None if self.all => FoundBy::All,
            None => {
                return Err(labels.not_own.map_or(NotForwardedReason::Unasked, NotForwardedReason::NotOwn));
            }
        };
        if let Err(why) = &labels.own_policy {
            return Err(NotForwardedReason::Unreadable(why.clone()));
        }
        let docker_name = self.names.get(at).cloned().flatten().ok_or(NotForwardedReason::Unasked)?;
        let name = labels.name.clone().unwrap_or_else(|| docker_name.clone());
        Ok((name, Claim { at, by, docker_name, labels: Arc::clone(labels) }))
    }

    /// Gives each name to one container.
    fn grant(&mut self, claims: BTreeMap<ContainerName, Vec<Claim>>) {
        for (name, mut claims) in claims {
            let current = self.registered.find(name.as_str()).cloned();
            if !self.is_free(&name) {
                for claim in claims {
                    self.refuse(&claim, &name, "somebody has registered".to_owned());
                }
                continue;
            }
            let holder = current.as_ref().and_then(|current| current.discovered.as_ref()?.id.clone());
            let place = |claim: &Claim| {
                let container = self.listed.get(claim.at).map(|one| &one.container);
                let holds = container.is_some_and(|container| Some(&container.id) == holder.as_ref());
                let runs = container.is_some_and(|container| container.running);
                let made = container.map_or(i64::MAX, |container| container.created);
                (!holds, !runs, made)
            };
            claims.sort_by_cached_key(place);
            let mut claims = claims.into_iter();
            let Some(winner) = claims.next() else { continue };
            let winner_name = winner.docker_name.clone();
            self.give(&name, winner, current);
            for claim in claims {
                self.refuse(&claim, &name, format!("container {winner_name} has"));
            }
        }
    }

    fn give(&mut self, name: &ContainerName, claim: Claim, current: Option<Arc<Registration>>) {
        let Some(Candidate { container, .. }) = self.listed.get(claim.at) else { return };
        let known = current.as_ref().and_then(|current| current.discovered.as_ref());
        let is_same = known.is_some_and(|known| known.id.as_ref() == Some(&container.id));
        if !is_same && !container.running {
            self.settle(claim.at, Verdict::Not(NotForwardedReason::NotRunning));
            return;
        }
        self.settle(claim.at, Verdict::Forwarded(name.clone(), claim.by));
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
        self.remark(claim.at, text);
        self.settle(claim.at, Verdict::Not(NotForwardedReason::NameTaken { name: name.clone(), holder }));
    }

    fn drop_what_nobody_claims(&mut self) {
        for registration in self.registered.entries.iter().filter(|registration| is_derived(registration)) {
            let name = &registration.container_name;
            if !self.kept.contains(name) && !self.moved_to.contains(name) {
                self.steps.push(Step::Drop(Arc::clone(registration)));
            }
        }
    }
}

/// Whether a registration follows from Docker's list alone.
fn is_derived(registration: &Registration) -> bool {
    registration.discovered.as_ref().is_some_and(|discovered| discovered.by != FoundBy::Name)
}

/// A registration of the daemon's making. It is about no folder of the host: nobody of the host named one.
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

/// What it takes that a container is no longer forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detach {
    /// This step, after which nothing is remembered.
    Forget(Step),
    /// This step, after which it is remembered that it is off.
    TurnOff(Step),
    /// It is off already.
    IsOff(ContainerName),
    /// It cannot be done, and why.
    Refused(String),
}

/// How the container of this name, Docker's or that of its registration, is no longer forwarded, whatever its labels say.
/// Without a list of containers it is taken that none would be forwarded by itself.
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

/// The same for a container that is not registered, and would be as soon as it runs.
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
