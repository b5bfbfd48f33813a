//! Waiting for a state with a time limit, instead of waiting for a fixed time.

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// The time after which a state counts as unreachable. Everything that works needs less than a tenth of it.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// Calls `look` repeatedly until it returns `Ok`, and returns the value.
///
/// # Panics
/// After [`TIMEOUT`], with `what` was expected and the last state.
#[track_caller]
pub fn wait_until<T, S: Debug>(what: &str, mut look: impl FnMut() -> Result<T, S>) -> T {
    let start = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) => {
                assert!(start.elapsed() < TIMEOUT, "waited {TIMEOUT:?} for {what}; last seen: {seen:?}")
            }
        }
        // Pauses between two calls, so that the awaited process can run.
        std::thread::sleep(Duration::from_millis(2));
    }
}
