//! Upstreams whose sockets others hold as well, each on a shard of its own: how they are added, asked with a bound, and left.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Instant;

use super::{Conductor, Placed};
use crate::command::{
    Event, ForwardId, ForwardState, ListenFailure, ListenFailureKind, UpstreamId, UpstreamKind, WatchSources,
};
use crate::shard::{Lent, ShardCommand};
use crate::watch::Sources;

/// Why an upstream is let go whose shard does not obey.
const HANGS: &str = "a socket that its agent handed over holds up whoever uses it, so it is used no more";

impl Conductor {
    pub(super) fn add_agent(
        &mut self,
        upstream: UpstreamId,
        netns_cookie: u64,
        sources: WatchSources,
        descriptors: Vec<OwnedFd>,
    ) {
        if sources.proc_tcp || sources.proc_tcp6 {
            return self.refuse(format!(
                "{upstream} is an agent's, and a file from an agent is not read: it may never answer"
            ));
        }
        let expected = 1 + sources.count();
        let got = descriptors.len();
        let mut descriptors = descriptors.into_iter();
        let (true, Some(channel)) = (got == expected, descriptors.next()) else {
            return self.refuse(format!(
                "{upstream} came with {got} descriptors; expected {expected}, one channel to its agent and the \
                 sources named"
            ));
        };
        if self.ending {
            return self.refuse(format!("{upstream} comes too late: the engine is ending"));
        }
        let own = match self.apart.start() {
            Ok(own) => own,
            Err(reason) => return self.refuse(format!("{upstream}: {reason}")),
        };
        let kind = UpstreamKind::Agent;
        let channel = Some(channel);
        self.send(own, ShardCommand::AddUpstream { upstream, kind, channel, netns_cookie });
        self.hold(upstream, netns_cookie, HashSet::from([own]), Some(own));
        if sources.sock_diag {
            self.watcher.add(upstream, Sources { sock_diag: descriptors.next(), ..Sources::default() });
        }
    }

    /// When something is to be done that nobody sends a message for.
    pub(super) fn due(&self) -> Option<Instant> {
        if self.apart.is_empty() {
            return None;
        }
        let closings = self.forwards.values().filter_map(|placed| placed.due);
        let removals = self.upstreams.values().filter_map(|held| held.due);
        let questions = self.descriptions.due().into_iter().chain(self.lendings.due());
        closings.chain(removals).chain(questions).chain(self.apart.due()).min()
    }

    /// Goes on without those that took too long.
    pub(super) fn on_time(&mut self, now: Instant) {
        let forwards = &self.forwards;
        self.descriptions.on_time(now, |shard| known(forwards, shard));
        self.lendings.on_time(now, |shard| lendable(forwards, shard));
        self.tell_answers();
        let is_over = |due: Option<Instant>| due.is_some_and(|due| due <= now);
        let closings = self.forwards.values().filter(|placed| is_over(placed.due)).map(|placed| placed.shard);
        let removals = self.upstreams.values().filter(|held| is_over(held.due)).filter_map(|held| held.apart);
        let mut hang: HashSet<usize> = closings.chain(removals).collect();
        hang.extend(self.apart.on_time(now));
        for shard in hang {
            self.part_with(shard, HANGS);
        }
    }

    /// What a shard counted, to be told where it does not answer.
    pub(super) fn note_seen(&mut self, forwards: &[ForwardState]) {
        for state in forwards {
            if let Some(placed) = self.forwards.get_mut(&state.forward) {
                placed.seen = state.stats;
            }
        }
    }

    /// Leaves a shard to itself: its ports are free from now on, whether or not it ever closes its own descriptors of them.
    pub(super) fn part_with(&mut self, shard: usize, reason: &str) {
        self.apart.abandon(shard);
        let mut forwards: Vec<ForwardId> =
            self.forwards.iter().filter(|(_, placed)| placed.shard == shard).map(|(id, _)| *id).collect();
        forwards.sort();
        for forward in forwards {
            let Some(placed) = self.forwards.remove(&forward) else { continue };
            // Where another engine listens on them as well, they stay, and that engine takes whoever comes.
            for socket in placed.kept.iter().filter(|_| !placed.lent) {
                // The only error is that it does not listen any more.
                let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
            }
            self.tell(Event::ListenerClosed { forward, stats: placed.seen });
        }
        let upstream = self.upstreams.iter().find(|(_, held)| held.apart == Some(shard)).map(|(id, _)| *id);
        if let Some(upstream) = upstream
            && let Some(held) = self.upstreams.remove(&upstream)
        {
            self.watcher.remove(upstream);
            let reason = if held.leaving { held.reason } else { Some(reason.to_owned()) };
            self.tell(Event::UpstreamRemoved { upstream, reason });
        }
        self.forgo_answers(shard);
    }
}

/// What the conductor knows itself of the forwards of a shard.
fn known(forwards: &HashMap<ForwardId, Placed>, shard: usize) -> Vec<ForwardState> {
    let of_shard = forwards.iter().filter(|(_, placed)| placed.shard == shard);
    of_shard.map(|(forward, placed)| placed.state(*forward)).collect()
}

/// The listeners of a shard that can be lent without it.
fn lendable(forwards: &HashMap<ForwardId, Placed>, shard: usize) -> Vec<Lent> {
    let of_shard = forwards.iter().filter(|(_, placed)| placed.shard == shard && placed.due.is_none());
    of_shard
        .filter_map(|(forward, placed)| {
            let sockets = duplicates(&placed.kept).ok()?;
            Some(Lent { forward: placed.state(*forward), sockets })
        })
        .collect()
}

impl Placed {
    fn state(&self, forward: ForwardId) -> ForwardState {
        ForwardState {
            forward,
            upstream: self.upstream,
            host_port: self.host_port,
            target_port: self.target_port,
            reach: self.reach,
            listening: self.due.is_none(),
            stats: self.seen,
        }
    }
}

/// A second descriptor of each socket.
///
/// # Errors
/// None are left.
pub(super) fn duplicates(sockets: &[OwnedFd]) -> Result<Vec<OwnedFd>, ListenFailure> {
    sockets.iter().map(OwnedFd::try_clone).collect::<Result<_, _>>().map_err(|error| ListenFailure {
        kind: ListenFailureKind::Exhausted,
        address: sockets
            .first()
            .and_then(|socket| rustix::net::getsockname(socket).ok())
            .and_then(|address| SocketAddr::try_from(address).ok())
            .unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0))),
        detail: error.to_string(),
    })
}
