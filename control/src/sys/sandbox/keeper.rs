//! The keeper of a sandbox: `landfall _keeper`, a process that ends the sandbox when landfall dies.
//!
//! The command's calls of `bind` and `listen` wait for landfall's answers. Without landfall they fail (ENOSYS), so a
//! sandbox must not outlive landfall. If landfall dies, the command itself gets a signal, but the processes that it
//! started do not. The keeper waits for the end of its standard input, a pipe that only landfall holds open, and then
//! kills every process in the sandbox's network namespace. A byte on that pipe ends the keeper instead: landfall has
//! ended the sandbox itself.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use super::SandboxError;
use super::remains::Namespace;

/// A keeper, which ends when this value is dropped.
#[derive(Debug)]
pub struct Keeper(Child);

impl Keeper {
    /// Starts the keeper of the sandbox that process `pid` is in. It has a process group of its own, since Ctrl-C is
    /// for the command, which may outlive the signal.
    ///
    /// # Errors
    /// [`SandboxError::Start`].
    pub fn start(pid: u32) -> Result<Keeper, SandboxError> {
        let child = Command::new("/proc/self/exe")
            .arg0("landfall")
            .args(["_keeper", &pid.to_string()])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        child.map(Keeper).map_err(SandboxError::Start)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(mut pipe) = self.0.stdin.take() {
            // If this fails, the keeper has ended already.
            let _ = pipe.write_all(&[0]);
        }
        let _ = self.0.wait();
    }
}

/// Runs the keeper.
pub fn main(pid: u32) {
    // The namespace ends with its last process: then the sandbox has ended.
    let Ok(namespace) = Namespace::around(pid) else { return };
    let mut byte = [0; 1];
    loop {
        match std::io::stdin().read(&mut byte) {
            Ok(0) => return namespace.clear(),
            Ok(_) => return,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return namespace.clear(),
        }
    }
}
