//! A child process in a process group of its own, which is killed when it is dropped.

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::Child;

/// A child that leads its process group. Dropping it kills the group, unless the child has been waited for: then the
/// rest of the group keeps running.
#[derive(Debug)]
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        // The child has an id until it is waited for. Until then no other process group can have that id.
        let group = self.0.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(group) = group {
            // It may have ended just now.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}
