//! Waiting for a state, never for a while.

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// How long anything may take before it counts as never happening. Nothing that works needs a tenth of it.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Looks again and again until `look` gives `Ok`, and returns it.
///
/// # Panics
/// After [`PATIENCE`], with `what` was waited for and what was last seen.
#[track_caller]
pub fn wait_until<T, S: Debug>(what: &str, mut look: impl FnMut() -> Result<T, S>) -> T {
    let start = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) => {
                assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}; last seen: {seen:?}")
            }
        }
        // Between two looks, so that whoever is waited for has the processor.
        std::thread::sleep(Duration::from_millis(2));
    }
}
