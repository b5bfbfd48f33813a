use std::io::{ErrorKind, Read, Write};
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use landfall_engine::channel::{Channel, ChannelError};
use landfall_engine::opener::{Answer, DialFailure, Request};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, oneshot};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use super::*;
use crate::forwarding::broker_link::{ANNOUNCEMENTS_MAX, Announcement, SessionUpdate};
use crate::model::announcement::ForwardResult;

const CANARY: &str = "canary-5b21";
const PATIENCE: Duration = Duration::from_secs(20);

/// Brokers whose container side and forwarding side are driven by a test.
struct World {
    brokers: Arc<Brokers>,
    reports: mpsc::UnboundedReceiver<Report>,
    links: mpsc::UnboundedReceiver<Link>,
    listener: TcpListener,
    journal: broadcast::Receiver<Arc<str>>,
}

/// The forwarding side of one link.
struct Link {
    announced: mpsc::Receiver<Announcement>,
    words: mpsc::UnboundedSender<SessionUpdate>,
}

struct Container(WebSocketStream<TcpStream>);

impl World {
    async fn new() -> World {
        let journal = Journal::unkept();
        let heard = journal.listen();
        let docker = Docker::at(Some("unix:///nowhere/docker.sock".to_owned()));
        let (brokers, reports) = Brokers::new(docker, journal, Extensions::NONE);
        let (links_in, links) = mpsc::unbounded_channel();
        brokers.connect(Box::new(move |_| {
            let (announce, announced) = mpsc::channel(ANNOUNCEMENTS_MAX);
            let (words, heard) = mpsc::unbounded_channel();
            links_in.send(Link { announced, words }).unwrap();
            BrokerLink { announce, updates: heard }
        }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        World { brokers, reports, links, listener, journal: heard }
    }

    fn registration(&self, token: &str, policy: Value) -> Arc<Registration> {
        let fields = json!({
            "containerName": "coder", "cwd": "/", "wsHostPort": self.listener.local_addr().unwrap().port(),
            "portForward": policy, "brokerToken": token,
        });
        let Value::Object(fields) = fields else { unreachable!() };
        Arc::new(Registration::from_fields(fields).unwrap())
    }

    async fn start(&self, token: &str) {
        Brokers::start(&self.brokers, self.registration(token, json!({"allow": "*"}))).await;
    }

    async fn stop(&self) {
        Brokers::stop(&self.brokers, &name()).await;
    }

    async fn link(&mut self) -> Link {
        within(self.links.recv()).await.unwrap()
    }

    /// Accepts the broker's WebSocket as the container, and receives the hello with this token.
    async fn accept_hello(&mut self, token: &str) -> Container {
        let (stream, _) = within(self.listener.accept()).await.unwrap();
        let mut container = Container(within(tokio_tungstenite::accept_async(stream)).await.unwrap());
        container.expect(json!({"type": "broker-hello", "token": token})).await;
        container
    }

    /// Starts a broker, and drives both sides until it watches.
    async fn up(&mut self) -> (Container, Link) {
        self.start(CANARY).await;
        let mut link = self.link().await;
        let mut container = self.accept_hello(CANARY).await;
        container.send(json!({"type": "broker-hello-ack"})).await;
        container.expect(json!({"type": "port-watch-subscribe"})).await;
        assert!(matches!(link.announcement().await, Announcement::Up));
        (container, link)
    }

    /// Returns all notices so far.
    fn notices(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.journal.try_recv().ok())
            .map(|line| {
                assert!(!line.contains(CANARY), "{line}");
                let line: Value = serde_json::from_str(&line).unwrap();
                line["text"].as_str().unwrap().to_owned()
            })
            .collect()
    }
}

impl Link {
    async fn announcement(&mut self) -> Announcement {
        within(self.announced.recv()).await.unwrap()
    }

    async fn stopped(&mut self) -> oneshot::Sender<()> {
        match self.announcement().await {
            Announcement::Stop(notices) => notices,
            other => panic!("{other:?}"),
        }
    }

    /// Gives the broker a channel, and returns the engine's end.
    fn channel(&self) -> Channel {
        let (engine, ours) = Channel::pair().unwrap();
        self.words.send(SessionUpdate::Serve(vec![ours.into()])).unwrap();
        engine
    }
}

impl Container {
    async fn send(&mut self, message: Value) {
        self.0.send(Message::text(message.to_string())).await.unwrap();
    }

    async fn message(&mut self) -> Value {
        match within(self.0.next()).await.unwrap().unwrap() {
            Message::Text(text) => serde_json::from_str(&text).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    async fn expect(&mut self, message: Value) {
        assert_eq!(self.message().await, message);
    }

    async fn closed(&mut self) {
        while let Some(Ok(message)) = within(self.0.next()).await {
            assert!(message.is_close(), "{message:?}");
        }
    }
}

async fn within<T>(waited_for: impl Future<Output = T>) -> T {
    timeout(PATIENCE, waited_for).await.expect("it did not happen")
}

fn name() -> ContainerName {
    ContainerName::new("coder").unwrap()
}

fn port(port: u16) -> NonZeroU16 {
    NonZeroU16::new(port).unwrap()
}

fn dial(engine: &Channel, dial: u64) {
    engine.send(&Request::Dial { dial, port: port(5173) }, &[]).unwrap();
}

async fn answer(engine: &Channel) -> (Answer, Vec<OwnedFd>) {
    loop {
        match engine.try_recv() {
            Err(ChannelError::WouldBlock) => within(tokio::time::sleep(Duration::from_millis(1))).await,
            answer => return answer.unwrap().unwrap(),
        }
    }
}

/// Returns a connected socket of the engine, in blocking mode.
async fn connected(container: &mut Container, engine: &Channel, id: i64) -> std::net::TcpStream {
    dial(engine, 70);
    container.expect(json!({"type": "relay-open", "streamId": id, "port": 5173})).await;
    container.send(json!({"type": "relay-open-ack", "streamId": id})).await;
    let (dialled, mut sockets) = answer(engine).await;
    assert_eq!(dialled, Answer::Dialled { dial: 70 });
    let socket = std::net::TcpStream::from(sockets.pop().unwrap());
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

async fn read(mut socket: std::net::TcpStream) -> std::io::Result<Vec<u8>> {
    let reading = tokio::task::spawn_blocking(move || {
        let mut all = Vec::new();
        socket.read_to_end(&mut all).map(|_| all)
    });
    within(reading).await.unwrap()
}

#[tokio::test]
async fn a_broker_authenticates_watches_and_sends_results() {
    let mut world = World::new().await;
    let (mut container, mut link) = world.up().await;
    let listener = json!({"port": 5173, "bindAddr": "127.0.0.1"});
    container.send(json!({"type": "port-listen-snapshot", "ports": [listener]})).await;
    let Announcement::Listening { opened, whole: true, .. } = link.announcement().await else { panic!() };
    let result = ForwardResult { port: opened[0].port, result: Ok(port(5173)) };
    link.words.send(SessionUpdate::Result(result)).unwrap();
    container
        .expect(json!({"type": "port-forward-result", "port": 5173, "ok": true, "hostPort": 5173}))
        .await;
    assert_eq!(world.notices(), ["[portbroker:coder] connected"]);
}

#[tokio::test]
async fn a_dialled_stream_is_relayed_in_both_directions_and_closed() {
    let mut world = World::new().await;
    let (mut container, link) = world.up().await;
    let engine = link.channel();
    let mut socket = connected(&mut container, &engine, 1).await;
    socket.write_all(b"ping").unwrap();
    container.expect(json!({"type": "relay-data", "streamId": 1, "bytes": "cGluZw=="})).await;
    container.send(json!({"type": "relay-data", "streamId": 1, "bytes": "cG9uZw=="})).await;
    container.send(json!({"type": "relay-close", "streamId": 1, "side": "upstream"})).await;
    assert_eq!(read(socket).await.unwrap(), b"pong");
    // The end of a client is sent to the container, and a refusal of the container to the engine.
    drop(connected(&mut container, &engine, 2).await);
    container.expect(json!({"type": "relay-close", "streamId": 2, "side": "downstream"})).await;
    dial(&engine, 71);
    container.expect(json!({"type": "relay-open", "streamId": 3, "port": 5173})).await;
    container.send(json!({"type": "relay-open-nack", "streamId": 3, "reason": "ECONNREFUSED"})).await;
    assert_eq!(answer(&engine).await.0, Answer::NotDialled { dial: 71, why: DialFailure::Refused });
}

#[tokio::test]
async fn a_lost_websocket_resets_its_streams_and_refuses_dials_until_it_is_back() {
    let mut world = World::new().await;
    let (mut container, mut link) = world.up().await;
    let engine = link.channel();
    let socket = connected(&mut container, &engine, 1).await;
    drop(container);
    assert_eq!(read(socket).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(matches!(link.announcement().await, Announcement::Down));
    dial(&engine, 72);
    assert_eq!(answer(&engine).await.0, Answer::NotDialled { dial: 72, why: DialFailure::Refused });
    let mut container = world.accept_hello(CANARY).await;
    container.send(json!({"type": "broker-hello-ack"})).await;
    container.expect(json!({"type": "port-watch-subscribe"})).await;
    assert!(matches!(link.announcement().await, Announcement::Up));
    // Channels and stream numbers survive the reconnection.
    drop(connected(&mut container, &engine, 2).await);
    assert_eq!(world.notices().len(), 3);
}

#[tokio::test]
async fn a_stop_ends_after_forwarding_has_released_the_link() {
    let mut world = World::new().await;
    let (mut container, mut link) = world.up().await;
    let engine = link.channel();
    let socket = connected(&mut container, &engine, 1).await;
    let brokers = Arc::clone(&world.brokers);
    let stopping = tokio::spawn(async move { brokers.stop(&name()).await });
    let notices = link.stopped().await;
    assert!(!stopping.is_finished());
    // Until then, dials are answered.
    dial(&engine, 73);
    assert_eq!(answer(&engine).await.0, Answer::NotDialled { dial: 73, why: DialFailure::Refused });
    assert_eq!(read(socket).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    container.closed().await;
    notices.send(()).unwrap();
    within(stopping).await.unwrap();
    assert!(world.brokers.lock().is_empty());
    assert!(matches!(engine.try_recv::<Answer>(), Ok(None)), "the channel is open");
    assert_eq!(world.notices().last().unwrap(), "[portbroker:coder] stopped");
}

#[tokio::test]
async fn a_broker_starts_after_its_predecessor_even_if_the_caller_gave_up() {
    let mut world = World::new().await;
    let (_container, mut link) = world.up().await;
    assert!(timeout(Duration::from_millis(50), world.stop()).await.is_err());
    assert!(timeout(Duration::from_millis(50), world.start("next")).await.is_err());
    assert!(world.links.try_recv().is_err(), "the next broker has started");
    let notices = link.stopped().await;
    notices.send(()).unwrap();
    world.link().await;
    world.accept_hello("next").await;
}

#[tokio::test]
async fn a_refused_token_is_reported_once_after_the_broker_has_ended() {
    let mut world = World::new().await;
    world.start(CANARY).await;
    let mut link = world.link().await;
    let mut container = world.accept_hello(CANARY).await;
    container.send(json!({"type": "broker-hello-nack", "reason": "invalid token"})).await;
    let notices = link.stopped().await;
    container.closed().await;
    assert!(world.reports.try_recv().is_err());
    notices.send(()).unwrap();
    let report = within(world.reports.recv()).await.unwrap();
    assert_eq!((report.name, report.finding), (name(), Finding::Rejected("invalid token".to_owned())));
    assert!(report.token.matches(CANARY));
    // The handler of the report does not wait.
    within(world.stop()).await;
    assert!(world.reports.try_recv().is_err());
    let text = "[portbroker:coder] the token is refused, and not presented again: invalid token";
    assert_eq!(world.notices(), [text]);
}

#[tokio::test]
async fn a_stop_ends_a_connection_attempt() {
    let mut world = World::new().await;
    world.start(CANARY).await;
    let mut link = world.link().await;
    let (stream, _) = within(world.listener.accept()).await.unwrap();
    let brokers = Arc::clone(&world.brokers);
    let stopping = tokio::spawn(async move { brokers.drain().await });
    link.stopped().await.send(()).unwrap();
    within(stopping).await.unwrap();
    // Reads the broker's request, and then the end of the stream.
    let mut bytes = vec![0; 4096];
    while within(async {
        stream.readable().await.unwrap();
        !matches!(stream.try_read(&mut bytes), Ok(0))
    })
    .await
    {}
}

#[tokio::test]
async fn a_policy_that_allows_no_port_starts_no_broker_and_is_reported() {
    let mut world = World::new().await;
    let off = world.registration(CANARY, json!({"allow": []}));
    Brokers::start(&world.brokers, off).await;
    assert!(world.brokers.lock().is_empty());
    assert!(world.links.try_recv().is_err());
    assert_eq!(world.notices(), ["[portbroker:coder] not started: its list of allowed ports is empty"]);
}
