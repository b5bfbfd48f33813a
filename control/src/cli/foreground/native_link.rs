//! The link from `run` to the daemon: reports the complete state of the native listeners at each change.
//!
//! The daemon keeps the listeners for as long as the connection is open, so it drops those of a `run` that has died. A
//! thread holds the connection. After the daemon ends, the thread tries to connect until a daemon accepts, and sends
//! the state again. The listeners do not depend on the link.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use landfall_engine::native::NativeEvent;
use rustix::net::RecvFlags;

use crate::daemon::rpc::client::Client;
use crate::model::native_state::NativeState;

/// The interval between checks whether the daemon has closed the connection, and between connection attempts.
const CHECK: Duration = Duration::from_millis(500);

/// Starts to report `events` for the registration whose current name is in `name`.
///
/// # Errors
/// The thread cannot be started.
pub fn start(client: Client, name: Arc<Mutex<String>>, events: Receiver<NativeEvent>) -> io::Result<()> {
    let work = move || {
        Link { client, name, state: NativeState::default(), stream: None }.run(&events);
    };
    thread::Builder::new().name("native-link".to_owned()).spawn(work).map(drop)
}

struct Link {
    client: Client,
    name: Arc<Mutex<String>>,
    state: NativeState,
    stream: Option<UnixStream>,
}

impl Link {
    /// Reports until the supervisor has ended.
    fn run(mut self, events: &Receiver<NativeEvent>) {
        self.connect();
        loop {
            match events.recv_timeout(CHECK) {
                Ok(event) => {
                    let mut changed = self.state.apply(&event);
                    // Events that arrived together are sent as one message.
                    while let Ok(event) = events.try_recv() {
                        changed |= self.state.apply(&event);
                    }
                    if changed && self.stream.is_some() {
                        self.send();
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.stream.as_ref().is_none_or(has_ended) {
                self.connect();
            }
        }
    }

    /// Connects, and sends the state. If the daemon does not have the registration yet, the next check tries again.
    fn connect(&mut self) {
        let name = self.name.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.stream = self.client.native(&name).ok();
        if self.stream.is_some() {
            self.send();
        }
    }

    fn send(&mut self) {
        let Some(stream) = &mut self.stream else { return };
        // Serialisation cannot fail: a state consists of numbers, addresses and strings.
        let Ok(mut line) = serde_json::to_vec(&self.state) else { return };
        line.push(b'\n');
        if stream.write_all(&line).is_err() {
            self.stream = None;
        }
    }
}

/// Returns whether the daemon has closed its end. The daemon sends no data.
fn has_ended(stream: &UnixStream) -> bool {
    let mut byte = [0; 1];
    let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
    let received = rustix::net::recv(stream, byte.as_mut_slice(), flags);
    !matches!(received, Err(rustix::io::Errno::AGAIN) | Ok((1.., _)))
}
