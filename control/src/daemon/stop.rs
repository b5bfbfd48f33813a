//! That the daemon is to stop: said once or more often, by a signal or over the socket, and heard by whoever waits for it.

use tokio::sync::watch;

/// Whether to stop, and how. Clones are the same switch.
#[derive(Clone, Debug)]
pub struct StopSwitch(watch::Sender<StopRequest>);

#[derive(Clone, Copy, Debug, Default)]
struct StopRequest {
    /// Somebody asked over the socket; the answer may still be on its way.
    asked: bool,
    /// The stop has begun.
    stopping: bool,
    /// The engine ends, too.
    drain_engine: bool,
}

impl Default for StopSwitch {
    fn default() -> StopSwitch {
        StopSwitch(watch::Sender::new(StopRequest::default()))
    }
}

impl StopSwitch {
    /// Notes that somebody asked for a stop; whether nobody had before.
    pub fn ask(&self) -> bool {
        self.0.send_if_modified(|wish| !std::mem::replace(&mut wish.asked, true))
    }

    /// Whether somebody asked for it, rather than sent a signal.
    pub fn was_asked(&self) -> bool {
        self.0.borrow().asked
    }

    /// Begins the stop. Once it has begun, another one does nothing, except that it may still say that the engine ends.
    pub fn pull(&self, drain_engine: bool) {
        self.0.send_modify(|wish| {
            wish.stopping = true;
            wish.drain_engine |= drain_engine;
        });
    }

    /// Whether the stop has begun.
    pub fn is_pulled(&self) -> bool {
        self.0.borrow().stopping
    }

    /// Whether the engine is to end, as far as anybody has said so yet.
    pub fn drains_engine(&self) -> bool {
        self.0.borrow().drain_engine
    }

    /// Returns when the stop begins.
    pub async fn pulled(&self) {
        // The sender is our own, so there always is one.
        let _ = self.0.subscribe().wait_for(|wish| wish.stopping).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stop_begins_once_and_may_take_the_engine_with_it_later() {
        let switch = StopSwitch::default();
        assert!(switch.ask());
        assert!(!switch.ask());
        assert!(!switch.is_pulled(), "asking is not stopping");
        switch.pull(false);
        assert!(switch.is_pulled() && !switch.drains_engine());
        switch.pull(true);
        switch.pull(false);
        assert!(switch.drains_engine());
        assert!(switch.was_asked());
        switch.pulled().await;
    }
}
