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

/// Brokers with one container's end and forwarding's in the hands of a test.
struct World {
    brokers: Arc<Brokers>,
    reports: mpsc::UnboundedReceiver<Report>,
    links: mpsc::UnboundedReceiver<Link>,
    listener: TcpListener,
    journal: broadcast::Receiver<Arc<str>>,
}

/// Forwarding's end of one link.
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

    /// The container's end, up to the hello with this token.
    async fn greeted(&mut self, token: &str) -> Container {
        let (stream, _) = within(self.listener.accept()).await.unwrap();
        let mut container = Container(within(tokio_tungstenite::accept_async(stream)).await.unwrap());
        container.hears(json!({"type": "broker-hello", "token": token})).await;
        container
    }

    /// Both ends, up to where the broker watches.
    async fn up(&mut self) -> (Container, Link) {
        self.start(CANARY).await;
        let mut link = self.link().await;
        let mut container = self.greeted(CANARY).await;
        container.say(json!({"type": "broker-hello-ack"})).await;
        container.hears(json!({"type": "port-watch-subscribe"})).await;
        assert!(matches!(link.announcement().await, Announcement::Up));
        (container, link)
    }

    /// Everything that was told so far.
    fn told(&mut self) -> Vec<String> {
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
            Announcement::Stop(told) => told,
            other => panic!("{other:?}"),
        }
    }

    /// The engine's end of a channel over which it dials.
    fn channel(&self) -> Channel {
        let (engine, ours) = Channel::pair().unwrap();
        self.words.send(SessionUpdate::Serve(vec![ours.into()])).unwrap();
        engine
    }
}

impl Container {
    async fn say(&mut self, message: Value) {
        self.0.send(Message::text(message.to_string())).await.unwrap();
    }

    async fn message(&mut self) -> Value {
        match within(self.0.next()).await.unwrap().unwrap() {
            Message::Text(text) => serde_json::from_str(&text).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    async fn hears(&mut self, message: Value) {
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

/// A socket of the engine's, for a thread that may wait.
async fn connected(container: &mut Container, engine: &Channel, id: i64) -> std::net::TcpStream {
    dial(engine, 70);
    container.hears(json!({"type": "relay-open", "streamId": id, "port": 5173})).await;
    container.say(json!({"type": "relay-open-ack", "streamId": id})).await;
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
async fn a_broker_greets_watches_and_tells_results() {
    let mut world = World::new().await;
    let (mut container, mut link) = world.up().await;
    let listener = json!({"port": 5173, "bindAddr": "127.0.0.1"});
    container.say(json!({"type": "port-listen-snapshot", "ports": [listener]})).await;
    let Announcement::Listening { opened, whole: true, .. } = link.announcement().await else { panic!() };
    let result = ForwardResult { port: opened[0].port, result: Ok(port(5173)) };
    link.words.send(SessionUpdate::Result(result)).unwrap();
    container.hears(json!({"type": "port-forward-result", "port": 5173, "ok": true, "hostPort": 5173})).await;
    assert_eq!(world.told(), ["[portbroker:coder] connected"]);
}

#[tokio::test]
async fn what_the_engine_dials_is_relayed_in_both_directions_and_closed() {
    let mut world = World::new().await;
    let (mut container, link) = world.up().await;
    let engine = link.channel();
    let mut socket = connected(&mut container, &engine, 1).await;
    socket.write_all(b"ping").unwrap();
    container.hears(json!({"type": "relay-data", "streamId": 1, "bytes": "cGluZw=="})).await;
    container.say(json!({"type": "relay-data", "streamId": 1, "bytes": "cG9uZw=="})).await;
    container.say(json!({"type": "relay-close", "streamId": 1, "side": "upstream"})).await;
    assert_eq!(read(socket).await.unwrap(), b"pong");
    // One that the client ends is told to the container, and one that is refused to the engine.
    drop(connected(&mut container, &engine, 2).await);
    container.hears(json!({"type": "relay-close", "streamId": 2, "side": "downstream"})).await;
    dial(&engine, 71);
    container.hears(json!({"type": "relay-open", "streamId": 3, "port": 5173})).await;
    container.say(json!({"type": "relay-open-nack", "streamId": 3, "reason": "ECONNREFUSED"})).await;
    assert_eq!(answer(&engine).await.0, Answer::NotDialled { dial: 71, why: DialFailure::Refused });
}

#[tokio::test]
async fn the_loss_of_the_websocket_resets_its_streams_and_refuses_dials_until_it_is_back() {
    let mut world = World::new().await;
    let (mut container, mut link) = world.up().await;
    let engine = link.channel();
    let socket = connected(&mut container, &engine, 1).await;
    drop(container);
    assert_eq!(read(socket).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(matches!(link.announcement().await, Announcement::Down));
    dial(&engine, 72);
    assert_eq!(answer(&engine).await.0, Answer::NotDialled { dial: 72, why: DialFailure::Refused });
    let mut container = world.greeted(CANARY).await;
    container.say(json!({"type": "broker-hello-ack"})).await;
    container.hears(json!({"type": "port-watch-subscribe"})).await;
    assert!(matches!(link.announcement().await, Announcement::Up));
    // The channels and the numbers of streams are what they were.
    drop(connected(&mut container, &engine, 2).await);
    assert_eq!(world.told().len(), 3);
}

#[tokio::test]
async fn a_stop_is_over_when_forwarding_has_let_go() {
    let mut world = World::new().await;
    let (mut container, mut link) = world.up().await;
    let engine = link.channel();
    let socket = connected(&mut container, &engine, 1).await;
    let brokers = Arc::clone(&world.brokers);
    let stopping = tokio::spawn(async move { brokers.stop(&name()).await });
    let told = link.stopped().await;
    assert!(!stopping.is_finished());
    // Until then, whoever dials is answered.
    dial(&engine, 73);
    assert_eq!(answer(&engine).await.0, Answer::NotDialled { dial: 73, why: DialFailure::Refused });
    assert_eq!(read(socket).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    container.closed().await;
    told.send(()).unwrap();
    within(stopping).await.unwrap();
    assert!(world.brokers.lock().is_empty());
    assert!(matches!(engine.try_recv::<Answer>(), Ok(None)), "the channel is open");
    assert_eq!(world.told().last().unwrap(), "[portbroker:coder] stopped");
}

#[tokio::test]
async fn a_broker_begins_when_the_one_before_it_has_ended_though_nobody_waits_for_that() {
    let mut world = World::new().await;
    let (_container, mut link) = world.up().await;
    assert!(timeout(Duration::from_millis(50), world.stop()).await.is_err());
    assert!(timeout(Duration::from_millis(50), world.start("next")).await.is_err());
    assert!(world.links.try_recv().is_err(), "the next one has begun");
    let told = link.stopped().await;
    told.send(()).unwrap();
    world.link().await;
    world.greeted("next").await;
}

#[tokio::test]
async fn a_token_that_is_refused_is_reported_once_by_a_broker_that_has_ended() {
    let mut world = World::new().await;
    world.start(CANARY).await;
    let mut link = world.link().await;
    let mut container = world.greeted(CANARY).await;
    container.say(json!({"type": "broker-hello-nack", "reason": "invalid token"})).await;
    let told = link.stopped().await;
    container.closed().await;
    assert!(world.reports.try_recv().is_err());
    told.send(()).unwrap();
    let report = within(world.reports.recv()).await.unwrap();
    assert_eq!((report.name, report.finding), (name(), Finding::Rejected("invalid token".to_owned())));
    assert!(report.token.matches(CANARY));
    // What follows the report does not wait for anything.
    within(world.stop()).await;
    assert!(world.reports.try_recv().is_err());
    let text = "[portbroker:coder] the token is refused, and not presented again: invalid token";
    assert_eq!(world.told(), [text]);
}

#[tokio::test]
async fn a_stop_while_it_connects_ends_the_attempt() {
    let mut world = World::new().await;
    world.start(CANARY).await;
    let mut link = world.link().await;
    let (stream, _) = within(world.listener.accept()).await.unwrap();
    let brokers = Arc::clone(&world.brokers);
    let stopping = tokio::spawn(async move { brokers.drain().await });
    link.stopped().await.send(()).unwrap();
    within(stopping).await.unwrap();
    // Its request, and then the end.
    let mut bytes = vec![0; 4096];
    while within(async {
        stream.readable().await.unwrap();
        !matches!(stream.try_read(&mut bytes), Ok(0))
    })
    .await
    {}
}

#[tokio::test]
async fn a_policy_that_allows_nothing_has_no_broker_and_says_so() {
    let mut world = World::new().await;
    let off = world.registration(CANARY, json!({"allow": []}));
    Brokers::start(&world.brokers, off).await;
    assert!(world.brokers.lock().is_empty());
    assert!(world.links.try_recv().is_err());
    assert_eq!(world.told(), ["[portbroker:coder] not started: its list of allowed ports is empty"]);
}
