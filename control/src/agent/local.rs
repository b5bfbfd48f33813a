//! Requests from programs in the container to the agent for a port of the host (`landfall agent forward`).
//!
//! The socket is a Unix socket with an abstract name (`unix(7)`), derived from the port of the agent. It has no file,
//! so it works in a container without writable files. It belongs to the network namespace (`net/unix/af_unix.c`), so no
//! process outside the container can connect, and every process inside can, under any user. The host decides which
//! ports it forwards.
//!
//! One request per connection and one answer, each one line of JSON:
//!
//! ```text
//! {"kind":"forward","targetPort":4848,"hostCandidates":[4848,4849],"reason":"dashboard","waitMs":10000}
//! {"ok":true,"hostPort":4849}                              {"ok":false,"why":"refused","reason":"policy excluded"}
//! ```

use std::io::{self, BufRead, BufReader, Read, Write};
use std::num::NonZeroU16;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader as AsyncBufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::hub::Hub;
use crate::broker::container::ForwardRequest;

/// The longest request or answer, in bytes.
const LINE_BYTES_MAX: u64 = 64 * 1024;
/// The time for a program to send its request, and to read the answer.
const IO_TIME_MAX: Duration = Duration::from_secs(5);
/// The maximum of concurrent requests.
const CLIENTS_MAX: usize = 64;
/// The pause of accepting after an error, such as a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The maximum of host ports in one request.
pub const CANDIDATES_MAX: usize = 1024;
/// The longest wait that a request may ask for.
pub const WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// A request of a program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
pub enum Question {
    /// Forward a port of the host to a port of the container.
    Forward {
        /// The port in the container.
        target_port: NonZeroU16,
        /// Candidate ports on the host, in order of preference.
        host_candidates: Vec<NonZeroU16>,
        /// The purpose.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
        /// How long to wait for a host and for its answer, in milliseconds.
        wait_ms: u64,
    },
}

/// An answer of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The port on the host.
    Forwarded(NonZeroU16),
    /// A refusal, with its text.
    Not(RefusalReason, String),
}

/// The reason of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalReason {
    /// Every connected host refused.
    Refused,
    /// No host was connected in time. The request is kept.
    NoHost,
    /// A host is connected and did not answer in time. The request is kept.
    TimedOut,
    /// The agent has no broker token, so no host connects to it.
    NoToken,
    /// The limit of requested ports is reached.
    Full,
    /// The request is invalid.
    Invalid,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReplyLine {
    ok: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host_port: Option<NonZeroU16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    why: Option<RefusalReason>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl Reply {
    fn to_line(&self) -> String {
        let line = match self {
            Reply::Forwarded(port) => ReplyLine { ok: true, host_port: Some(*port), why: None, reason: None },
            Reply::Not(why, reason) => {
                ReplyLine { ok: false, host_port: None, why: Some(*why), reason: Some(reason.clone()) }
            }
        };
        // Serialisation cannot fail: the line consists of strings and numbers.
        format!("{}\n", serde_json::to_string(&line).unwrap_or_default())
    }

    fn from_line(line: &str) -> Result<Reply, AskError> {
        let line: ReplyLine = serde_json::from_str(line).map_err(|_| AskError::Nonsense)?;
        match (line.ok, line.host_port, line.why) {
            (true, Some(port), _) => Ok(Reply::Forwarded(port)),
            (false, _, Some(why)) => Ok(Reply::Not(why, line.reason.unwrap_or_default())),
            _ => Err(AskError::Nonsense),
        }
    }
}

/// The reason why a request got no answer.
#[derive(Debug, Error)]
pub enum AskError {
    /// No agent with this port runs here.
    #[error("no agent that serves port {0} runs in this network namespace")]
    NoAgent(u16),
    /// The connection failed.
    #[error("cannot communicate with the agent")]
    Broken(#[from] io::Error),
    /// The answer is invalid.
    #[error("the answer is not one of an agent")]
    Nonsense,
}

fn address(agent_port: u16) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("landfall-agent-{agent_port}"))
}

/// Sends a request to the agent that serves `agent_port`. Waits for `wait` plus `IO_TIME_MAX`.
///
/// # Errors
/// [`AskError`].
pub fn ask(agent_port: u16, question: &Question, wait: Duration) -> Result<Reply, AskError> {
    let mut stream =
        StdUnixStream::connect_addr(&address(agent_port)?).map_err(|error| match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => AskError::NoAgent(agent_port),
            _ => AskError::Broken(error),
        })?;
    stream.set_write_timeout(Some(IO_TIME_MAX))?;
    stream.set_read_timeout(Some(wait.saturating_add(IO_TIME_MAX)))?;
    let text = serde_json::to_string(question).map_err(io::Error::from)?;
    stream.write_all(format!("{text}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream.take(LINE_BYTES_MAX)).read_line(&mut line)?;
    Reply::from_line(&line)
}

/// Binds the abstract name of the agent that serves `agent_port`.
///
/// # Errors
/// EADDRINUSE if another program has the name.
pub(super) fn listen(agent_port: u16) -> io::Result<UnixListener> {
    let listener = StdUnixListener::bind_addr(&address(agent_port)?)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Answers requests until it is dropped. `has_token` is whether hosts can connect at all.
pub(super) async fn serve(listener: UnixListener, hub: Hub, has_token: bool) {
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    // The semaphore is never closed. Clients above the limit wait in the socket's queue.
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                let hub = hub.clone();
                tokio::spawn(async move {
                    converse(stream, hub, has_token).await;
                    drop(place);
                });
            }
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn converse(mut stream: UnixStream, hub: Hub, has_token: bool) {
    let (mut reading, mut writing) = stream.split();
    let mut lines = AsyncBufReader::new((&mut reading).take(LINE_BYTES_MAX));
    let mut line = String::new();
    let Ok(Ok(_)) = timeout(IO_TIME_MAX, lines.read_line(&mut line)).await else { return };
    let reply = match serde_json::from_str(&line) {
        Ok(question) => {
            let gone = async {
                // The program sends no more data, so the read ends when the program ends.
                let mut nothing = [0; 64];
                while let Ok(1..) = reading.read(&mut nothing).await {}
            };
            tokio::select! {
                reply = answer(question, &hub, has_token) => reply,
                () = gone => return,
            }
        }
        Err(error) => Reply::Not(RefusalReason::Invalid, format!("not a request: {error}")),
    };
    // An error means that the program has gone.
    let _ = timeout(IO_TIME_MAX, writing.write_all(reply.to_line().as_bytes())).await;
}

async fn answer(question: Question, hub: &Hub, has_token: bool) -> Reply {
    let Question::Forward { target_port, host_candidates, reason, wait_ms } = question;
    if !has_token {
        return Reply::Not(RefusalReason::NoToken, "the agent has no broker token".to_owned());
    }
    if host_candidates.len() > CANDIDATES_MAX {
        let reason = format!("more than {CANDIDATES_MAX} candidate ports are listed");
        return Reply::Not(RefusalReason::Invalid, reason);
    }
    let request = ForwardRequest { target: target_port, candidates: host_candidates, reason };
    let mut waiting = match hub.ask(request) {
        Ok(waiting) => waiting,
        Err(full) => return Reply::Not(RefusalReason::Full, full.to_string()),
    };
    let wait = Duration::from_millis(wait_ms).min(WAIT_MAX);
    match timeout(wait, waiting.outcome()).await {
        Ok(Ok(port)) => Reply::Forwarded(port),
        Ok(Err(reason)) => Reply::Not(RefusalReason::Refused, reason),
        Err(_) if *hub.hosts().borrow() == 0 => {
            Reply::Not(RefusalReason::NoHost, "no host is connected to the agent".to_owned())
        }
        Err(_) => Reply::Not(RefusalReason::TimedOut, "the host has not answered".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::announcement::ForwardResult;
    use proptest::prelude::*;
    use tokio::task::spawn_blocking;

    fn question(wait: Duration) -> Question {
        let port = |port| NonZeroU16::new(port).unwrap();
        Question::Forward {
            target_port: port(4848),
            host_candidates: vec![port(4848), port(4849)],
            reason: None,
            wait_ms: u64::try_from(wait.as_millis()).unwrap(),
        }
    }

    /// Runs an agent's local side under a number that no agent's port has, and sends it a request.
    async fn asked(number: u16, hub: &Hub, has_token: bool, wait: Duration) -> Reply {
        let listener = listen(number).unwrap();
        let serving = tokio::spawn(serve(listener, hub.clone(), has_token));
        let reply = spawn_blocking(move || ask(number, &question(wait), wait)).await.unwrap().unwrap();
        serving.abort();
        // Await the task, so that the name is released.
        let _ = serving.await;
        reply
    }

    #[tokio::test]
    async fn the_answer_of_the_host_is_returned() {
        let hub = Hub::new();
        let host = hub.join();
        let mut requests = hub.requests();
        let result = |result| ForwardResult { port: NonZeroU16::new(4848).unwrap(), result };
        let port = NonZeroU16::new(4849).unwrap();
        for (said, expected) in [
            (Ok(port), Reply::Forwarded(port)),
            (
                Err("policy excluded".to_owned()),
                Reply::Not(RefusalReason::Refused, "policy excluded".to_owned()),
            ),
        ] {
            let hosting = async {
                requests.changed().await.unwrap();
                hub.result(host, &result(said));
            };
            let (reply, ()) = tokio::join!(asked(1, &hub, true, IO_TIME_MAX), hosting);
            assert_eq!(reply, expected);
        }
    }

    #[tokio::test]
    async fn refusal_reasons_are_distinguished() {
        let hub = Hub::new();
        let short = Duration::from_millis(1);
        let why = |reply| match reply {
            Reply::Not(why, _) => why,
            Reply::Forwarded(port) => panic!("forwarded to {port}"),
        };
        assert_eq!(why(asked(2, &hub, false, short).await), RefusalReason::NoToken);
        assert_eq!(why(asked(2, &hub, true, short).await), RefusalReason::NoHost);
        hub.join();
        assert_eq!(why(asked(2, &hub, true, short).await), RefusalReason::TimedOut);
        let error = spawn_blocking(move || ask(3, &question(short), short)).await.unwrap().unwrap_err();
        assert!(matches!(error, AskError::NoAgent(3)), "{error:?}");
    }

    #[tokio::test]
    async fn an_invalid_request_is_answered_and_a_long_line_is_cut() {
        let listener = listen(4).unwrap();
        let serving = tokio::spawn(serve(listener, Hub::new(), true));
        let endless = usize::try_from(LINE_BYTES_MAX).unwrap() + 1;
        for text in ["{}\n".to_owned(), "x".repeat(endless), "\n".to_owned()] {
            let reply = spawn_blocking(move || {
                let mut stream = StdUnixStream::connect_addr(&address(4).unwrap()).unwrap();
                // The agent may close the connection before all is written.
                let _ = stream.write_all(text.as_bytes());
                let mut line = String::new();
                let _ = stream.read_to_string(&mut line);
                line
            });
            let reply = reply.await.unwrap();
            assert!(reply.is_empty() || reply.contains("\"why\":\"invalid\""), "{reply}");
        }
        serving.abort();
    }

    proptest! {
        #[test]
        fn arbitrary_answers_do_not_panic(text: String) {
            let _ = Reply::from_line(&text);
        }

        #[test]
        fn an_answer_is_read_back(port: NonZeroU16, reason: String) {
            for reply in [Reply::Forwarded(port), Reply::Not(RefusalReason::Refused, reason)] {
                prop_assert_eq!(Reply::from_line(&reply.to_line()).unwrap(), reply);
            }
        }
    }
}
