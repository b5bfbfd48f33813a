//! The channels over which the engine dials a container that is reached only through its broker: one for each shard of
//! the engine, with many dials in flight on each, and answers in any order.
//!
//! A task serves each channel. It reads a dial only when no answer waits to be written, so an engine that does not read
//! answers cannot queue more dials. A channel is served until the engine closes it, also if there are newer ones: an
//! engine that was replaced still finishes its connections.

use std::collections::HashMap;
use std::num::NonZeroU16;
use std::os::fd::{AsFd, OwnedFd};

use landfall_engine::channel::{self, ChannelError};
use landfall_engine::opener::{ANSWER_BYTES_MAX, Answer, DialFailure, Request};
use rustix::net::{RecvFlags, SendFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::host::DialKey;
use crate::sys::readiness::watched;

/// The maximum of received dials that wait for the broker, over all channels; further dials stay in the engine's socket
/// buffers.
const PENDING_DIALS_MAX: usize = 64;

/// A request or the end of an engine channel.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum DialRequest {
    /// The engine requests a connection to this port. Each dial must be answered.
    Dial(DialKey, NonZeroU16),
    /// The engine has closed the channel with this number.
    Closed(u64),
}

/// All channels of one broker. Dropping it closes them, which ends the upstream.
#[derive(Debug)]
pub(super) struct Dials {
    ask: mpsc::Sender<DialRequest>,
    asked: mpsc::Receiver<DialRequest>,
    answers: HashMap<u64, Answers>,
    last: u64,
    serving: JoinSet<()>,
}

/// The sender of a channel's answers, each with its socket if it has one. The queue is bounded by the number of dials.
type Answers = mpsc::UnboundedSender<(Answer, Option<OwnedFd>)>;

impl Dials {
    pub(super) fn new() -> Dials {
        let (ask, asked) = mpsc::channel(PENDING_DIALS_MAX);
        Dials { ask, asked, answers: HashMap::new(), last: 0, serving: JoinSet::new() }
    }

    /// Starts to serve these channels. A descriptor that is not a channel is closed.
    pub(super) fn serve(&mut self, channels: Vec<OwnedFd>) {
        // Reap the tasks that have ended.
        while self.serving.try_join_next().is_some() {}
        for channel in channels.into_iter().filter(|channel| channel::is_channel(channel.as_fd())) {
            let Ok(channel) = watched(channel, Interest::READABLE | Interest::WRITABLE) else { continue };
            self.last += 1;
            let (answers, answered) = mpsc::unbounded_channel();
            self.answers.insert(self.last, answers);
            self.serving.spawn(serve(channel, self.last, self.ask.clone(), answered));
        }
    }

    /// Returns the next request of the engine. Cancel-safe.
    pub(super) async fn next(&mut self) -> DialRequest {
        loop {
            // `self` holds a sender, so the channel never closes.
            if let Some(asked) = self.asked.recv().await {
                if let DialRequest::Closed(channel) = asked {
                    self.answers.remove(&channel);
                }
                return asked;
            }
        }
    }

    /// Returns the handle with which to answer a dial.
    pub(super) fn pending_reply(&self, key: DialKey) -> PendingReply {
        PendingReply { dial: key.dial, answers: self.answers.get(&key.channel).cloned() }
    }
}

/// The obligation to answer a dial. Dropping it sends a refusal.
#[derive(Debug)]
pub(super) struct PendingReply {
    dial: u64,
    /// `None` after the answer is sent, or if the channel is closed.
    answers: Option<Answers>,
}

impl PendingReply {
    /// Reports that the container connected to its server, with the socket that leads there.
    pub(super) fn dialled(mut self, socket: OwnedFd) {
        let dial = self.dial;
        self.send_answer(Answer::Dialled { dial }, Some(socket));
    }

    /// Reports that the container did not connect.
    pub(super) fn refused(mut self, why: DialFailure) {
        let dial = self.dial;
        self.send_answer(Answer::NotDialled { dial, why }, None);
    }

    fn send_answer(&mut self, answer: Answer, socket: Option<OwnedFd>) {
        if let Some(answers) = self.answers.take() {
            // If the channel has ended, the answer and its socket are dropped.
            let _ = answers.send((answer, socket));
        }
    }
}

impl Drop for PendingReply {
    fn drop(&mut self) {
        let (dial, why) = (self.dial, DialFailure::Refused);
        self.send_answer(Answer::NotDialled { dial, why }, None);
    }
}

/// Serves one channel until the engine closes it.
async fn serve(
    channel: AsyncFd<OwnedFd>,
    number: u64,
    ask: mpsc::Sender<DialRequest>,
    mut answered: mpsc::UnboundedReceiver<(Answer, Option<OwnedFd>)>,
) {
    loop {
        let asked = tokio::select! {
            biased;
            answer = answered.recv() => {
                let Some((answer, socket)) = answer else { break };
                if send(&channel, &answer, socket).await.is_err() {
                    break;
                }
                continue;
            }
            asked = receive(&channel) => asked,
        };
        // Any other request is a protocol error.
        let Ok(Some((Request::Dial { dial, port }, _))) = asked else { break };
        if ask.send(DialRequest::Dial(DialKey { channel: number, dial }, port)).await.is_err() {
            return;
        }
    }
    // An error means that the broker has ended.
    let _ = ask.send(DialRequest::Closed(number)).await;
}

async fn receive(channel: &AsyncFd<OwnedFd>) -> channel::Received<Request> {
    loop {
        let mut ready = channel.readable().await.map_err(ChannelError::System)?;
        match channel::receive(channel.get_ref().as_fd(), ANSWER_BYTES_MAX, RecvFlags::DONTWAIT) {
            Err(ChannelError::WouldBlock) => ready.clear_ready(),
            done => return done,
        }
    }
}

async fn send(
    channel: &AsyncFd<OwnedFd>,
    answer: &Answer,
    socket: Option<OwnedFd>,
) -> Result<(), ChannelError> {
    let sockets: Vec<_> = socket.iter().map(AsFd::as_fd).collect();
    loop {
        let mut ready = channel.writable().await.map_err(ChannelError::System)?;
        match channel::send(channel.get_ref().as_fd(), answer, &sockets, SendFlags::DONTWAIT) {
            Err(ChannelError::WouldBlock) => ready.clear_ready(),
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use landfall_engine::channel::Channel;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn port(port: u16) -> NonZeroU16 {
        NonZeroU16::new(port).unwrap()
    }

    fn served(dials: &mut Dials) -> Channel {
        let (engine, ours) = Channel::pair().unwrap();
        dials.serve(vec![ours.into()]);
        engine
    }

    async fn answer(engine: &Channel) -> (Answer, Vec<OwnedFd>) {
        loop {
            match engine.try_recv() {
                Err(ChannelError::WouldBlock) => tokio::task::yield_now().await,
                answer => return answer.unwrap().unwrap(),
            }
        }
    }

    #[tokio::test]
    async fn dials_are_taken_and_answered_in_any_order() {
        let mut dials = Dials::new();
        let engine = served(&mut dials);
        for dial in [7, 8] {
            engine.send(&Request::Dial { dial, port: port(80) }, &[]).unwrap();
        }
        let key = |dial| DialKey { channel: 1, dial };
        assert_eq!(dials.next().await, DialRequest::Dial(key(7), port(80)));
        assert_eq!(dials.next().await, DialRequest::Dial(key(8), port(80)));
        let (_theirs, ours) = std::os::unix::net::UnixStream::pair().unwrap();
        dials.pending_reply(key(8)).dialled(ours.into());
        dials.pending_reply(key(7)).refused(DialFailure::TimedOut);
        let (first, sockets) = answer(&engine).await;
        assert_eq!((first, sockets.len()), (Answer::Dialled { dial: 8 }, 1));
        let (second, _) = answer(&engine).await;
        assert_eq!(second, Answer::NotDialled { dial: 7, why: DialFailure::TimedOut });
    }

    #[tokio::test]
    async fn a_dropped_reply_is_a_refusal() {
        let mut dials = Dials::new();
        let engine = served(&mut dials);
        engine.send(&Request::Dial { dial: 7, port: port(80) }, &[]).unwrap();
        let DialRequest::Dial(key, _) = dials.next().await else { panic!() };
        drop(dials.pending_reply(key));
        let refused = Answer::NotDialled { dial: 7, why: DialFailure::Refused };
        assert_eq!(answer(&engine).await.0, refused);
    }

    #[tokio::test]
    async fn a_channel_that_the_engine_closes_or_misuses_is_reported() {
        let mut dials = Dials::new();
        let (first, second) = (served(&mut dials), served(&mut dials));
        drop(first);
        assert_eq!(dials.next().await, DialRequest::Closed(1));
        second.send(&Request::SockDiag, &[]).unwrap();
        assert_eq!(dials.next().await, DialRequest::Closed(2));
        assert!(dials.answers.is_empty());
        // The descriptor is closed soon after that.
        while !matches!(second.try_recv::<Answer>(), Ok(None)) {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn dropping_the_dials_closes_the_channels() {
        let mut dials = Dials::new();
        let engine = served(&mut dials);
        drop(dials);
        let closed = tokio::task::spawn_blocking(move || engine.recv_timeout::<Answer>(PATIENCE));
        assert!(closed.await.unwrap().unwrap().is_none());
    }

    #[tokio::test]
    async fn a_descriptor_that_is_not_a_channel_is_not_served() {
        let mut dials = Dials::new();
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        dials.serve(vec![ours.into()]);
        assert!(dials.answers.is_empty());
    }
}
