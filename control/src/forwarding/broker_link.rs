//! What a broker's session and forwarding tell each other.
//!
//! The session knows the wire; forwarding knows ports, policy and the engine. For each registration with a broker there is
//! one [`BrokerLink`] as long as the broker lives, across its WebSocket's losses.
//!
//! Where forwarding can enter the container itself, what is announced opens nothing: the container is told what became of
//! each port all the same.

use std::num::NonZeroU16;
use std::os::fd::OwnedFd;

use tokio::sync::{mpsc, oneshot};

use crate::model::announcement::{Announced, ForwardResult};

/// How many announcements of one session may wait for forwarding.
pub(crate) const ANNOUNCEMENTS_MAX: usize = 16;

/// What a session tells forwarding.
#[derive(Debug)]
pub enum Announcement {
    /// The container has taken the token. The first [`Announcement::Listening`] follows and tells all there is.
    Up,
    /// What listens in the container: everything (`whole`), or what changed. Each port of `opened` is owed one
    /// [`SessionUpdate::Result`], unless it is reserved, or forwarded already when it was told before.
    Listening {
        /// In the order told.
        opened: Vec<Announced>,
        /// In the order told; empty where it is `whole`.
        closed: Vec<NonZeroU16>,
        /// This replaces what was known.
        whole: bool,
    },
    /// A reserved forward is asked for (wire specification, A.3.8). It is owed one [`SessionUpdate::Result`].
    Reserve {
        /// The port in the container.
        target: NonZeroU16,
        /// Ports on the host, the best first.
        candidates: Vec<NonZeroU16>,
    },
    /// The WebSocket is lost: automatic forwards that led over it close (`host-error`), reserved ones stay.
    Down,
    /// The broker stops: every forward that led over it closes (`broker-stopped`), and the answer is given when the last one
    /// has.
    Stop(oneshot::Sender<()>),
}

/// What forwarding tells a session.
#[derive(Debug)]
pub enum SessionUpdate {
    /// What became of a port that was announced or reserved.
    Result(ForwardResult),
    /// The engine dials over these channels from now on, and over no earlier ones (one for each of its shards;
    /// [`Request::Dial`](landfall_engine::opener::Request::Dial)). Closing them is the end of the upstream.
    Serve(Vec<OwnedFd>),
}

/// A broker's end.
#[derive(Debug)]
pub struct BrokerLink {
    /// To forwarding. Dropping it stops as [`Announcement::Stop`] does. It is bounded: a session that waits for room reads
    /// nothing from its container meanwhile, so one that announces without end is slowed down and no other one is.
    pub announce: mpsc::Sender<Announcement>,
    /// From forwarding.
    pub words: mpsc::UnboundedReceiver<SessionUpdate>,
}
