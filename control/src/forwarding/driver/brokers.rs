//! The links to brokers: a session's announcements come in, and results go out.
//!
//! There is one link for each container name. A new link replaces the old one, which then counts as stopped.
//!
//! For a container that cannot be entered and has a session, the engine gets an upstream for which the session dials:
//! one channel for each of its shards, with the other ends sent to the session ([`SessionUpdate::Serve`]). Each engine
//! gets new channels.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use landfall_engine::channel::Channel;
use landfall_engine::command::{Command, UpstreamId, UpstreamKind, WatchSources};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use crate::forwarding::broker_link::{ANNOUNCEMENTS_MAX, Announcement, BrokerLink, SessionUpdate};
use crate::forwarding::driver::event_loop::{Driver, Engine, REENTER_PAUSE};
use crate::forwarding::engine_link::Link;
use crate::model::event::Event as JournalEvent;
use crate::model::forward_table::Reachability;
use crate::model::registration::{AttachMethod, ContainerName};

/// The most announcements of all sessions that are taken in before the next plan.
pub(super) const SESSION_MESSAGES_MAX: usize = 64;

/// An announcement of a session, or the end of its link.
#[derive(Debug)]
pub(super) struct SessionMessage {
    name: ContainerName,
    /// The number of the link: messages of one that was replaced may still arrive.
    link: u64,
    /// `None` when the broker has dropped its end.
    announcement: Option<Announcement>,
}

/// Forwarding's end of a link.
#[derive(Debug)]
struct LinkEnd {
    number: u64,
    updates: mpsc::UnboundedSender<SessionUpdate>,
    _task: AbortOnDropHandle<()>,
}

/// All links.
#[derive(Debug)]
pub(super) struct Brokers {
    ends: BTreeMap<ContainerName, LinkEnd>,
    next: u64,
    sender: mpsc::Sender<SessionMessage>,
    receiver: mpsc::Receiver<SessionMessage>,
    /// Brokers that stop, until the last of their ports is reported closed.
    stopping: Vec<(ContainerName, oneshot::Sender<()>)>,
}

/// Creates both ends of a link.
pub(super) fn link() -> (BrokerLink, mpsc::Receiver<Announcement>, mpsc::UnboundedSender<SessionUpdate>) {
    let (announce, announcements) = mpsc::channel(ANNOUNCEMENTS_MAX);
    let (updates, receiver) = mpsc::unbounded_channel();
    (BrokerLink { announce, updates: receiver }, announcements, updates)
}

impl Brokers {
    pub(super) fn new() -> Brokers {
        // Senders that wait for room get it in the order of their arrival (tokio's channels are fair), so no session
        // can starve another one by announcing without end.
        let (sender, receiver) = mpsc::channel(SESSION_MESSAGES_MAX);
        Brokers { ends: BTreeMap::new(), next: 1, sender, receiver, stopping: Vec::new() }
    }

    /// Waits for the next message of a session.
    pub(super) async fn recv(&mut self) -> SessionMessage {
        match self.receiver.recv().await {
            Some(message) => message,
            // The channel cannot end while this value holds one of its senders.
            None => std::future::pending().await,
        }
    }

    /// Returns a message that has arrived already.
    pub(super) fn try_recv(&mut self) -> Option<SessionMessage> {
        self.receiver.try_recv().ok()
    }

    fn add(
        &mut self,
        name: ContainerName,
        mut announcements: mpsc::Receiver<Announcement>,
        updates: mpsc::UnboundedSender<SessionUpdate>,
    ) {
        let number = self.next;
        self.next += 1;
        let (sender, own) = (self.sender.clone(), name.clone());
        let task = tokio::spawn(async move {
            loop {
                let announcement = announcements.recv().await;
                let gone = announcement.is_none();
                // The receiver is gone after forwarding has ended.
                if sender
                    .send(SessionMessage { name: own.clone(), link: number, announcement })
                    .await
                    .is_err()
                    || gone
                {
                    return;
                }
            }
        });
        let end = LinkEnd { number, updates, _task: AbortOnDropHandle::new(task) };
        self.ends.insert(name, end);
    }

    /// Sends an update to a session, unless that is gone.
    pub(super) fn send_update(&self, name: &ContainerName, update: SessionUpdate) {
        if let Some(end) = self.ends.get(name) {
            let _ = end.updates.send(update);
        }
    }
}

/// Creates a channel for each shard of an engine: the ends of the session, and those of the engine.
fn channel_pairs(shards: u16) -> io::Result<(Vec<OwnedFd>, Vec<OwnedFd>)> {
    let pair = |_| Channel::pair().map(|(ours, theirs)| (OwnedFd::from(ours), OwnedFd::from(theirs)));
    (0..shards).map(pair).collect()
}

/// The command that adds an upstream for which a session dials, without its descriptors.
fn add_dialled_upstream((upstream, netns_cookie): (UpstreamId, u64)) -> Command {
    let sources = WatchSources::default();
    Command::AddUpstream { upstream, netns_cookie, sources, kind: UpstreamKind::Dialler }
}

/// The channels of each session for a new engine, until that one takes over.
pub(super) struct Handover(Vec<(ContainerName, Vec<OwnedFd>)>);

impl Driver {
    /// Adds a broker. One of the same name that has not stopped counts as stopped.
    pub(super) fn add_broker(
        &mut self,
        name: ContainerName,
        announcements: mpsc::Receiver<Announcement>,
        updates: mpsc::UnboundedSender<SessionUpdate>,
    ) {
        self.planner.broker_stopped(&name);
        self.brokers.add(name, announcements, updates);
    }

    /// Handles a message of a session.
    pub(super) async fn on_session_message(&mut self, message: SessionMessage) {
        let SessionMessage { name, link, announcement } = message;
        let known = self.brokers.ends.get(&name).is_some_and(|end| end.number == link);
        let now = Instant::now();
        let changes = match announcement {
            Some(Announcement::Stop(done)) => {
                if known {
                    self.end_broker(&name).await;
                }
                self.brokers.stopping.push((name, done));
                return;
            }
            // Messages of a link that was replaced are ignored.
            _ if !known => return,
            None => return self.end_broker(&name).await,
            Some(Announcement::Up) => {
                self.planner.broker_up(&name);
                Vec::new()
            }
            Some(Announcement::Down) => {
                self.planner.broker_down(&name);
                Vec::new()
            }
            Some(Announcement::Listening { opened, closed, whole }) => {
                self.planner.announce(&name, &opened, &closed, whole, now)
            }
            Some(Announcement::Reserve { target, candidates }) => {
                self.planner.reserve(&name, target, candidates)
            }
        };
        self.report_changes(changes);
    }

    /// Answers the brokers that stop and whose ports have all closed.
    pub(super) fn answer_stopped_brokers(&mut self) {
        let attached = matches!(self.engine, Engine::Attached(..));
        for (name, done) in std::mem::take(&mut self.brokers.stopping) {
            if attached && self.planner.holds_dialled(&name) {
                self.brokers.stopping.push((name, done));
            } else {
                // The caller may have gone.
                let _ = done.send(());
            }
        }
    }

    async fn end_broker(&mut self, name: &ContainerName) {
        self.brokers.ends.remove(name);
        self.planner.broker_stopped(name);
        self.step_once().await;
    }

    /// Adds an upstream for each container that its session can dial for and that cannot be entered.
    pub(super) async fn dial_upstreams(&mut self) {
        let now = Instant::now();
        let names: Vec<ContainerName> = self
            .containers
            .iter()
            .filter(|container| {
                container.may_dial(now) && self.planner.wants_dialled_upstream(container.name())
            })
            .map(|container| container.name().clone())
            .collect();
        for name in names {
            let Engine::Attached(link, _) = &self.engine else { return };
            match channel_pairs(link.shards) {
                Ok((ours, theirs)) => {
                    let Some(upstream) = self.planner.dial(&name) else { continue };
                    if self.send_command(&add_dialled_upstream(upstream), &theirs).await {
                        self.brokers.send_update(&name, SessionUpdate::Serve(ours));
                    }
                }
                Err(error) => {
                    self.notice(format!(
                        "container \"{name}\" cannot be reached over its WebSocket: {error}"
                    ));
                    self.dial_later(&name);
                }
            }
        }
    }

    /// Delays the next upstream of a session.
    pub(super) fn dial_later(&mut self, name: &ContainerName) {
        for container in self.containers.iter_mut().filter(|container| container.name() == name) {
            container.dial_at = Some(Instant::now() + REENTER_PAUSE);
        }
    }

    /// Adds the upstreams of all sessions to a new engine, under their present numbers.
    pub(super) async fn dial_upstreams_for(
        &mut self,
        new: &Link,
        upstreams: &mut BTreeSet<UpstreamId>,
    ) -> Result<Handover, String> {
        let mut handover = Vec::new();
        for container in &self.containers {
            let name = container.name();
            let Some(upstream) = self.planner.dialled(name) else { continue };
            let (ours, theirs) = channel_pairs(new.shards).map_err(|error| error.to_string())?;
            new.send_command(&add_dialled_upstream(upstream), &theirs)
                .await
                .map_err(|error| error.to_string())?;
            upstreams.insert(upstream.0);
            handover.push((name.clone(), ours));
        }
        Ok(Handover(handover))
    }

    /// Sends the sessions their channels to the new engine.
    pub(super) fn send_channels(&self, Handover(handover): Handover) {
        for (name, channels) in handover {
            self.brokers.send_update(&name, SessionUpdate::Serve(channels));
        }
    }

    /// Records an event if whether a container is reached over its session alone has changed.
    pub(super) fn report_session(&mut self, at: usize) {
        let Some(container) = self.containers.get_mut(at) else { return };
        let over = container.is_dialled(&self.planner);
        if std::mem::replace(&mut container.session_reported, over) == over {
            return;
        }
        let container_name = container.name().as_str().to_owned();
        self.journal.record(&match (over, container.state) {
            (true, _) => JournalEvent::ContainerReached {
                container_name,
                attach_method: AttachMethod::Websocket.to_string(),
            },
            // It is reached by another attach method, which has an event of its own.
            (false, Reachability::Reached) => return,
            (false, _) => {
                let reason = "its WebSocket is lost".to_owned();
                JournalEvent::ContainerUnreachable { container_name, reason }
            }
        });
    }
}
