//! The state that all host connections of one agent share: the reserved forwards that programs in the container
//! requested, and the programs that wait for a result (wire specification, A.3.8).
//!
//! A request is sent to every connected host, and to each host that connects later. A waiting program gets the answer
//! of the first host that forwards, or a refusal after all connected hosts have refused. A result has no reference to
//! its request, so a result for the same port that was already in transit counts as well.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU16;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{oneshot, watch};

use crate::broker::container::{ForwardRequest, RESERVED_MAX, Reserved};
use crate::model::announcement::ForwardResult;

/// The id of one authenticated connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct HostId(u64);

/// The outcome of a request: the host's port, or the reason of the refusal.
pub(super) type Outcome = Result<NonZeroU16, String>;

/// The shared state; clones refer to the same state.
#[derive(Clone, Debug)]
pub(super) struct Hub(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    /// The number of the newest request.
    requests: watch::Sender<u64>,
    /// The number of connected hosts.
    hosts: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct State {
    reserved: Reserved,
    hosts: HashSet<HostId>,
    waiters: HashMap<u64, Waiter>,
    last: u64,
}

#[derive(Debug)]
struct Waiter {
    target: NonZeroU16,
    refusals: HashMap<HostId, String>,
    answer: oneshot::Sender<Outcome>,
}

/// The limit of targets is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the limit of {RESERVED_MAX} requested ports is reached")]
pub(super) struct Full;

/// A wait for an outcome. Dropping it ends the wait; the request remains.
#[derive(Debug)]
pub(super) struct Waiting {
    hub: Hub,
    number: u64,
    answer: oneshot::Receiver<Outcome>,
}

impl Hub {
    pub(super) fn new() -> Hub {
        Hub(Arc::new(Inner {
            state: Mutex::default(),
            requests: watch::Sender::new(0),
            hosts: watch::Sender::new(0),
        }))
    }

    /// Calls `act` with the requests.
    pub(super) fn with_reserved<T>(&self, act: impl FnOnce(&Reserved) -> T) -> T {
        act(&self.state().reserved)
    }

    /// Returns a receiver that is notified of every request.
    pub(super) fn requests(&self) -> watch::Receiver<u64> {
        self.0.requests.subscribe()
    }

    /// Returns a receiver of the number of accepted hosts.
    pub(super) fn hosts(&self) -> watch::Receiver<usize> {
        self.0.hosts.subscribe()
    }

    /// Adds an accepted host.
    pub(super) fn join(&self) -> HostId {
        let mut state = self.state();
        state.last += 1;
        let host = HostId(state.last);
        state.hosts.insert(host);
        self.0.hosts.send_replace(state.hosts.len());
        host
    }

    /// Removes a host. All remaining hosts may have refused already.
    pub(super) fn leave(&self, host: HostId) {
        let mut state = self.state();
        state.hosts.remove(&host);
        self.0.hosts.send_replace(state.hosts.len());
        state.answer_refused();
    }

    /// Handles a result from a host.
    pub(super) fn result(&self, host: HostId, result: &ForwardResult) {
        let mut state = self.state();
        match &result.result {
            Ok(port) => {
                let waiters = state.waiters.extract_if(|_, waiter| waiter.target == result.port);
                // An error means that the waiting program has gone.
                waiters.for_each(|(_, waiter)| drop(waiter.answer.send(Ok(*port))));
            }
            Err(reason) => {
                for waiter in state.waiters.values_mut().filter(|waiter| waiter.target == result.port) {
                    waiter.refusals.insert(host, reason.clone());
                }
                state.answer_refused();
            }
        }
    }

    /// Requests a reserved forward from every host, now and whenever one connects.
    ///
    /// # Errors
    /// [`Full`].
    pub(super) fn ask(&self, request: ForwardRequest) -> Result<Waiting, Full> {
        let mut state = self.state();
        let target = request.target;
        if !state.reserved.insert(request) {
            return Err(Full);
        }
        let (answer, wait) = oneshot::channel();
        state.last += 1;
        let number = state.last;
        state.waiters.insert(number, Waiter { target, refusals: HashMap::new(), answer });
        self.0.requests.send_replace(state.reserved.last());
        drop(state);
        Ok(Waiting { hub: self.clone(), number, answer: wait })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Answers the waiters whose request every connected host has refused.
    fn answer_refused(&mut self) {
        let hosts = &self.hosts;
        let refused = |waiter: &Waiter| {
            !waiter.refusals.is_empty() && hosts.iter().all(|host| waiter.refusals.contains_key(host))
        };
        for (_, waiter) in self.waiters.extract_if(|_, waiter| refused(waiter)) {
            let reason = waiter.refusals.into_values().next().unwrap_or_default();
            // An error means that the waiting program has gone.
            let _ = waiter.answer.send(Err(reason));
        }
    }
}

impl Waiting {
    /// Waits for the outcome.
    pub(super) async fn outcome(&mut self) -> Outcome {
        match (&mut self.answer).await {
            Ok(outcome) => outcome,
            // The sender is dropped only with an answer, or with this value.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.hub.state().waiters.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(number: u16) -> NonZeroU16 {
        NonZeroU16::new(number).unwrap()
    }

    fn request(target: u16) -> ForwardRequest {
        ForwardRequest { target: port(target), candidates: vec![port(target)], reason: None }
    }

    fn refused(target: u16, why: &str) -> ForwardResult {
        ForwardResult { port: port(target), result: Err(why.to_owned()) }
    }

    fn poll_outcome(waiting: &mut Waiting) -> Option<Outcome> {
        waiting.answer.try_recv().ok()
    }

    #[test]
    fn the_first_host_that_forwards_answers_and_refusals_count_together() {
        let hub = Hub::new();
        let (one, other) = (hub.join(), hub.join());
        let mut first = hub.ask(request(4848)).unwrap();
        let mut second = hub.ask(request(5000)).unwrap();
        hub.result(one, &refused(4848, "EADDRINUSE"));
        assert_eq!(poll_outcome(&mut first), None, "the other host has not answered");
        hub.result(other, &ForwardResult { port: port(4848), result: Ok(port(4849)) });
        assert_eq!(poll_outcome(&mut first), Some(Ok(port(4849))));
        hub.result(one, &refused(5000, "policy excluded"));
        hub.leave(other);
        assert_eq!(poll_outcome(&mut second), Some(Err("policy excluded".to_owned())));
    }

    #[test]
    fn a_dropped_wait_leaves_only_the_request() {
        let hub = Hub::new();
        drop(hub.ask(request(4848)).unwrap());
        assert!(hub.state().waiters.is_empty());
        assert_eq!(hub.with_reserved(Reserved::last), 1);
        assert_eq!(*hub.requests().borrow(), 1);
    }

    #[test]
    fn requests_above_the_limit_are_refused() {
        let hub = Hub::new();
        for target in 1..=u16::try_from(RESERVED_MAX).unwrap() {
            hub.ask(request(target)).unwrap();
        }
        assert_eq!(hub.ask(request(9999)).unwrap_err(), Full);
        assert!(hub.ask(request(7)).is_ok(), "a known target needs no additional room");
    }
}
