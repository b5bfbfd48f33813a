//! A child process that was given a process group of its own, and ends when nobody waits for it any more.

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::Child;

/// A child that leads its process group. Dropping it kills the group, unless the child has been waited for: what it left
/// behind is left alone then.
#[derive(Debug)]
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        // There is an id until the child has been waited for; until then its group is nobody else's.
        let group = self.0.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(group) = group {
            // It may have ended just now.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}
