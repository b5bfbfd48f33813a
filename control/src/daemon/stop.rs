//! The stop switch of the daemon. Signals and RPC requests may set it, more than once; the main task waits for it.

use tokio::sync::watch;

/// Whether the daemon stops, and how. Clones share one state.
#[derive(Clone, Debug)]
pub struct StopSwitch(watch::Sender<StopRequest>);

#[derive(Clone, Copy, Debug, Default)]
struct StopRequest {
    /// A client requested the stop over the socket; its answer may not have been sent yet.
    requested: bool,
    /// The stop has started.
    stopping: bool,
    /// The engine is stopped, too.
    drain_engine: bool,
}

impl Default for StopSwitch {
    fn default() -> StopSwitch {
        StopSwitch(watch::Sender::new(StopRequest::default()))
    }
}

impl StopSwitch {
    /// Records that a client requested a stop. Returns whether this is the first request.
    pub fn request(&self) -> bool {
        self.0.send_if_modified(|request| !std::mem::replace(&mut request.requested, true))
    }

    /// Returns whether a client requested the stop. False if a signal caused it.
    pub fn was_requested(&self) -> bool {
        self.0.borrow().requested
    }

    /// Starts the stop. A later call can only add that the engine is stopped, too.
    pub fn start(&self, drain_engine: bool) {
        self.0.send_modify(|request| {
            request.stopping = true;
            request.drain_engine |= drain_engine;
        });
    }

    /// Returns whether the stop has started.
    pub fn is_started(&self) -> bool {
        self.0.borrow().stopping
    }

    /// Returns whether the engine is to be stopped, by all calls so far.
    pub fn drains_engine(&self) -> bool {
        self.0.borrow().drain_engine
    }

    /// Returns when the stop starts.
    pub async fn started(&self) {
        // `self` holds a sender, so the channel is open.
        let _ = self.0.subscribe().wait_for(|request| request.stopping).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stop_starts_once_and_may_add_the_engine_later() {
        let switch = StopSwitch::default();
        assert!(switch.request());
        assert!(!switch.request());
        assert!(!switch.is_started(), "a request does not start the stop");
        switch.start(false);
        assert!(switch.is_started() && !switch.drains_engine());
        switch.start(true);
        switch.start(false);
        assert!(switch.drains_engine());
        assert!(switch.was_requested());
        switch.started().await;
    }
}
