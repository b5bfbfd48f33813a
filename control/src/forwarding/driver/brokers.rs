//! Brokers: what their sessions announce comes in, and what became of it goes back.
//!
//! There is one link for a name. Another one takes its place, and the one before it counts as stopped.
//!
//! Where a container cannot be entered and has a session, the engine gets an upstream for which the session dials: a channel
//! for each of its shards, with the other ends given to the session ([`SessionUpdate::Serve`]). Each engine gets new ones.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use landfall_engine::channel::Channel;
use landfall_engine::command::{Command, UpstreamId, UpstreamKind, WatchSources};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use crate::forwarding::broker_link::{ANNOUNCEMENTS_MAX, Announcement, BrokerLink, SessionUpdate};
use crate::forwarding::driver::event_loop::{Driver, ENTER_AGAIN, Engine};
use crate::forwarding::engine_link::Link;
use crate::model::event::Event as JournalEvent;
use crate::model::forward_table::Reachability;
use crate::model::registration::{AttachMethod, ContainerName};

/// How many announcements of all sessions together are taken in before the next planning.
pub(super) const ANNOUNCED_MAX: usize = 64;

/// What a session said, or that it has gone.
#[derive(Debug)]
pub(super) struct SessionMessage {
    name: ContainerName,
    /// Of which link: one that was replaced may have left a word behind.
    link: u64,
    /// None when the broker has dropped its end.
    said: Option<Announcement>,
}

/// Forwarding's end of a link.
#[derive(Debug)]
struct LinkEnd {
    number: u64,
    words: mpsc::UnboundedSender<SessionUpdate>,
    _listening: AbortOnDropHandle<()>,
}

/// All links.
#[derive(Debug)]
pub(super) struct Brokers {
    ends: BTreeMap<ContainerName, LinkEnd>,
    next: u64,
    announced: mpsc::Sender<SessionMessage>,
    heard: mpsc::Receiver<SessionMessage>,
    /// Brokers that stop, until the last of their ports is told as closed.
    leaving: Vec<(ContainerName, oneshot::Sender<()>)>,
}

/// Both ends of a new link.
pub(super) fn link() -> (BrokerLink, mpsc::Receiver<Announcement>, mpsc::UnboundedSender<SessionUpdate>) {
    let (announce, announcements) = mpsc::channel(ANNOUNCEMENTS_MAX);
    let (words, receiver) = mpsc::unbounded_channel();
    (BrokerLink { announce, words: receiver }, announcements, words)
}

impl Brokers {
    pub(super) fn new() -> Brokers {
        // Those who wait for room get it in the order in which they came (tokio's channels are fair), so everybody has a turn
        // whatever another one announces.
        let (announced, heard) = mpsc::channel(ANNOUNCED_MAX);
        Brokers { ends: BTreeMap::new(), next: 1, announced, heard, leaving: Vec::new() }
    }

    /// Waits for what a session says next.
    pub(super) async fn hear(&mut self) -> SessionMessage {
        match self.heard.recv().await {
            Some(heard) => heard,
            // It cannot end while this value holds one of its senders.
            None => std::future::pending().await,
        }
    }

    /// What a session has said already.
    pub(super) fn heard_already(&mut self) -> Option<SessionMessage> {
        self.heard.try_recv().ok()
    }

    fn add(
        &mut self,
        name: ContainerName,
        mut announcements: mpsc::Receiver<Announcement>,
        words: mpsc::UnboundedSender<SessionUpdate>,
    ) {
        let number = self.next;
        self.next += 1;
        let (announced, own) = (self.announced.clone(), name.clone());
        let listening = tokio::spawn(async move {
            loop {
                let said = announcements.recv().await;
                let gone = said.is_none();
                // Nobody hears it any more where forwarding has ended.
                if announced.send(SessionMessage { name: own.clone(), link: number, said }).await.is_err()
                    || gone
                {
                    return;
                }
            }
        });
        let end = LinkEnd { number, words, _listening: AbortOnDropHandle::new(listening) };
        self.ends.insert(name, end);
    }

    /// Tells a session; one that has gone is told nothing.
    pub(super) fn tell(&self, name: &ContainerName, word: SessionUpdate) {
        if let Some(end) = self.ends.get(name) {
            let _ = end.words.send(word);
        }
    }
}

/// Channels for the shards of an engine: the ends of whoever dials, and those of the engine.
fn pairs(shards: u16) -> io::Result<(Vec<OwnedFd>, Vec<OwnedFd>)> {
    let pair = |_| Channel::pair().map(|(ours, theirs)| (OwnedFd::from(ours), OwnedFd::from(theirs)));
    (0..shards).map(pair).collect()
}

/// An upstream for which a broker's session is to dial: the command without its descriptors.
fn dialler((upstream, netns_cookie): (UpstreamId, u64)) -> Command {
    let sources = WatchSources::default();
    Command::AddUpstream { upstream, netns_cookie, sources, kind: UpstreamKind::Dialler }
}

/// What the sessions are given when an engine that has their upstreams already takes over.
pub(super) struct Handover(Vec<(ContainerName, Vec<OwnedFd>)>);

impl Driver {
    /// A broker begins; one of the same name that has not stopped does so now.
    pub(super) fn meet_broker(
        &mut self,
        name: ContainerName,
        announcements: mpsc::Receiver<Announcement>,
        words: mpsc::UnboundedSender<SessionUpdate>,
    ) {
        self.planner.broker_stopped(&name);
        self.brokers.add(name, announcements, words);
    }

    /// Takes in what a session said.
    pub(super) async fn hear_broker(&mut self, heard: SessionMessage) {
        let SessionMessage { name, link, said } = heard;
        let known = self.brokers.ends.get(&name).is_some_and(|end| end.number == link);
        let now = Instant::now();
        let changes = match said {
            Some(Announcement::Stop(done)) => {
                if known {
                    self.end_broker(&name).await;
                }
                self.brokers.leaving.push((name, done));
                return;
            }
            // One that was replaced has nothing to say any more.
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
        self.tell_all(changes);
    }

    /// Answers the brokers that stop and of which nothing is left.
    pub(super) fn see_off_brokers(&mut self) {
        let attached = matches!(self.engine, Engine::Attached(..));
        for (name, done) in std::mem::take(&mut self.brokers.leaving) {
            if attached && self.planner.holds_dialled(&name) {
                self.brokers.leaving.push((name, done));
            } else {
                // Whoever asked may have gone.
                let _ = done.send(());
            }
        }
    }

    async fn end_broker(&mut self, name: &ContainerName) {
        self.brokers.ends.remove(name);
        self.planner.broker_stopped(name);
        self.step_once().await;
    }

    /// Has sessions dial for the containers that cannot be entered.
    pub(super) async fn dial_all(&mut self) {
        let now = Instant::now();
        let names: Vec<ContainerName> = self
            .containers
            .iter()
            .filter(|container| container.may_dial(now) && self.planner.wants_dialler(container.name()))
            .map(|container| container.name().clone())
            .collect();
        for name in names {
            let Engine::Attached(link, _) = &self.engine else { return };
            match pairs(link.shards) {
                Ok((ours, theirs)) => {
                    let Some(upstream) = self.planner.dial(&name) else { continue };
                    if self.give(&dialler(upstream), &theirs).await {
                        self.brokers.tell(&name, SessionUpdate::Serve(ours));
                    }
                }
                Err(error) => {
                    self.notice(format!("nothing can be dialled for container \"{name}\": {error}"));
                    self.dial_later(&name);
                }
            }
        }
    }

    /// Has a session dial again, but not at once.
    pub(super) fn dial_later(&mut self, name: &ContainerName) {
        for container in self.containers.iter_mut().filter(|container| container.name() == name) {
            container.dial_again = Some(Instant::now() + ENTER_AGAIN);
        }
    }

    /// Gives the upstreams of all sessions to an engine that is not attached yet, under the numbers that they have.
    pub(super) async fn dial_for(
        &mut self,
        new: &Link,
        upstreams: &mut BTreeSet<UpstreamId>,
    ) -> Result<Handover, String> {
        let mut handover = Vec::new();
        for container in &self.containers {
            let name = container.name();
            let Some(upstream) = self.planner.dialled(name) else { continue };
            let (ours, theirs) = pairs(new.shards).map_err(|error| error.to_string())?;
            new.give(&dialler(upstream), &theirs).await.map_err(|error| error.to_string())?;
            upstreams.insert(upstream.0);
            handover.push((name.clone(), ours));
        }
        Ok(Handover(handover))
    }

    /// The sessions dial for the new engine from now on.
    pub(super) fn serve(&self, Handover(handover): Handover) {
        for (name, channels) in handover {
            self.brokers.tell(&name, SessionUpdate::Serve(channels));
        }
    }

    /// Tells whether a container is reached over its session alone, where that has changed.
    pub(super) fn tell_session(&mut self, at: usize) {
        let Some(container) = self.containers.get_mut(at) else { return };
        let over = container.is_dialled(&self.planner);
        if std::mem::replace(&mut container.over_session, over) == over {
            return;
        }
        let container_name = container.name().as_str().to_owned();
        self.journal.record(&match (over, container.state) {
            (true, _) => JournalEvent::ContainerReached {
                container_name,
                attach_method: AttachMethod::Websocket.to_string(),
            },
            // It is reached by another way, of which there is an event.
            (false, Reachability::Reached) => return,
            (false, _) => {
                let reason = "its WebSocket is lost".to_owned();
                JournalEvent::ContainerUnreachable { container_name, reason }
            }
        });
    }
}
