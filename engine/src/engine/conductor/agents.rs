//! Upstreams of agents, each on an isolated shard: how they are added, queried with a time limit, and abandoned.

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

/// The reason for removing an upstream whose shard missed a deadline.
const BLOCKED: &str = "a call on a socket of its agent does not return, so the agent is no longer used";

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
                "{upstream} is an agent's, and files from an agent are not accepted: a read may block for ever"
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
            return self.refuse(format!("{upstream} is too late: the engine is ending"));
        }
        let own = match self.isolated.start() {
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

    /// Returns the next deadline.
    pub(super) fn due(&self) -> Option<Instant> {
        if self.isolated.is_empty() {
            return None;
        }
        let closings = self.forwards.values().filter_map(|placed| placed.due);
        let removals = self.upstreams.values().filter_map(|held| held.due);
        let questions = self.descriptions.due().into_iter().chain(self.lendings.due());
        closings.chain(removals).chain(questions).chain(self.isolated.due()).min()
    }

    /// Continues without the shards that missed a deadline.
    pub(super) fn on_deadline(&mut self, now: Instant) {
        let forwards = &self.forwards;
        self.descriptions.on_deadline(now, |shard| known(forwards, shard));
        self.lendings.on_deadline(now, |shard| lendable(forwards, shard));
        self.emit_answers();
        let is_overdue = |due: Option<Instant>| due.is_some_and(|due| due <= now);
        let closings =
            self.forwards.values().filter(|placed| is_overdue(placed.due)).map(|placed| placed.shard);
        let removals =
            self.upstreams.values().filter(|held| is_overdue(held.due)).filter_map(|held| held.isolated);
        let mut blocked: HashSet<usize> = closings.chain(removals).collect();
        blocked.extend(self.isolated.on_deadline(now));
        for shard in blocked {
            self.abandon_shard(shard, BLOCKED);
        }
    }

    /// Records the counters of a shard, to report them if it does not answer.
    pub(super) fn record_stats(&mut self, forwards: &[ForwardState]) {
        for state in forwards {
            if let Some(placed) = self.forwards.get_mut(&state.forward) {
                placed.last_stats = state.stats;
            }
        }
    }

    /// Abandons a shard. Its ports are free from now on, even if it never closes its own descriptors of them.
    pub(super) fn abandon_shard(&mut self, shard: usize, reason: &str) {
        self.isolated.abandon(shard);
        let mut forwards: Vec<ForwardId> =
            self.forwards.iter().filter(|(_, placed)| placed.shard == shard).map(|(id, _)| *id).collect();
        forwards.sort();
        for forward in forwards {
            let Some(placed) = self.forwards.remove(&forward) else { continue };
            // If another engine has the sockets, too, they keep listening, and that engine accepts further clients.
            for socket in placed.kept.iter().filter(|_| !placed.lent) {
                // The only error is that the socket does not listen any more.
                let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
            }
            self.emit(Event::ListenerClosed { forward, stats: placed.last_stats });
        }
        let upstream =
            self.upstreams.iter().find(|(_, held)| held.isolated == Some(shard)).map(|(id, _)| *id);
        if let Some(upstream) = upstream
            && let Some(held) = self.upstreams.remove(&upstream)
        {
            self.watcher.remove(upstream);
            let reason = if held.removing { held.reason } else { Some(reason.to_owned()) };
            self.emit(Event::UpstreamRemoved { upstream, reason });
        }
        self.remove_from_answers(shard);
    }
}

/// Returns the states of a shard's forwards from the conductor's records.
fn known(forwards: &HashMap<ForwardId, Placed>, shard: usize) -> Vec<ForwardState> {
    let of_shard = forwards.iter().filter(|(_, placed)| placed.shard == shard);
    of_shard.map(|(forward, placed)| placed.state(*forward)).collect()
}

/// Returns the listeners of a shard that can be lent without its answer.
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
            stats: self.last_stats,
        }
    }
}

/// Returns a second descriptor of each socket.
///
/// # Errors
/// The process has no free descriptors.
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
