//! A Docker Engine that does what a case says: it knows containers by name, counts what it is asked, and can fail, hang
//! or hold a stop until it is let go. A thread for each connection; enough of the API for one daemon and no more.

mod create;
mod images;
mod request;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufReader, Write};
use std::net::{IpAddr, Shutdown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use self::request::{Request, parameter, read_request, respond};
use crate::{Home, PATIENCE, wait_until};

/// How it treats whoever asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DockerMode {
    /// It answers.
    Answers,
    /// It answers everything with 500.
    Fails,
    /// It takes requests and never answers.
    Hangs,
}

#[derive(Clone, Debug)]
struct Container {
    id: String,
    running: bool,
    pid: u32,
    image: String,
    /// Where port 8973 is published on the host.
    published: Option<u16>,
    labels: BTreeMap<String, String>,
    /// When it was made; each is made in a second of its own.
    created: u32,
    /// What an inspection tells otherwise.
    told: Value,
    /// The request that created it.
    wish: Value,
}

/// Whether an answer is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    No,
    /// The next one will be.
    Next,
    Yes,
}

#[derive(Debug)]
struct State {
    mode: DockerMode,
    containers: BTreeMap<String, Container>,
    /// Those that the next list by name leaves out, once each.
    missed: Vec<String>,
    /// Former names, by the id: so many whole lists more tell them beside the name.
    former: BTreeMap<String, (String, u32)>,
    /// The labels of images that have some, by name; none for an image that is gone.
    images: BTreeMap<String, Option<BTreeMap<String, String>>>,
    /// Whether a whole list waits, with what it is to tell, until it is let go.
    list: Held,
    /// The error of every start, if there is one.
    start_error: Option<String>,
    /// Stops wait while this holds.
    stops_held: bool,
    /// The gateway of the network `bridge`.
    gateway: Option<IpAddr>,
    /// It does not tell what happens while this holds.
    is_silent: bool,
    /// What it was asked, as `METHOD path`, in order.
    calls: Vec<String>,
    /// One for each `/events` that is open.
    listeners: Vec<UnixStream>,
    /// What it told so far, as it was sent, and when.
    told: Vec<(SystemTime, String)>,
    made: u32,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The fake engine; it listens until the case ends.
#[derive(Clone, Debug)]
pub struct FakeDocker(Arc<Shared>);

enum Reply {
    Json(u16, Value),
    Nothing(u16),
    Events,
    Hang,
}

impl FakeDocker {
    /// Listens where `home` looks for Docker, with these containers running.
    ///
    /// # Panics
    /// When the socket cannot be had.
    pub fn start(home: &Home, running: &[&str]) -> FakeDocker {
        FakeDocker::start_at(&home.docker_socket(), running)
    }

    fn start_at(path: &Path, running: &[&str]) -> FakeDocker {
        let state = State {
            mode: DockerMode::Answers,
            containers: BTreeMap::new(),
            missed: Vec::new(),
            former: BTreeMap::new(),
            images: BTreeMap::new(),
            list: Held::No,
            start_error: None,
            stops_held: false,
            gateway: None,
            is_silent: false,
            calls: Vec::new(),
            listeners: Vec::new(),
            told: Vec::new(),
            made: 0,
        };
        let fake = FakeDocker(Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() }));
        for name in running {
            fake.add(name, true);
        }
        let listener = UnixListener::bind(path).unwrap();
        let accepting = fake.clone();
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let fake = accepting.clone();
                std::thread::spawn(move || fake.serve(&stream));
            }
        });
        fake
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    /// Sets how it treats whoever asks, those that wait included.
    pub fn set_mode(&self, mode: DockerMode) {
        self.state().mode = mode;
        self.0.changed.notify_all();
    }

    /// Adds a container.
    pub fn add(&self, name: &str, running: bool) {
        let mut state = self.state();
        state.made += 1;
        let container = Container {
            id: format!("{:064x}", state.made),
            running,
            // Nobody is there: what looks for its namespace finds none.
            pid: 0,
            image: format!("image-of-{name}"),
            published: None,
            labels: BTreeMap::new(),
            created: state.made,
            told: Value::Null,
            wish: Value::Null,
        };
        state.containers.insert(name.to_owned(), container);
    }

    /// Makes a container with labels and starts it, and tells of both.
    ///
    /// # Panics
    /// When there is one of that name.
    pub fn launch(&self, name: &str, labels: &[(&str, &str)]) {
        self.launch_from(&format!("image-of-{name}"), name, labels);
    }

    /// The same with an image: its labels are copied to the container, below those of its own.
    ///
    /// # Panics
    /// When there is a container of that name.
    pub fn launch_from(&self, image: &str, name: &str, labels: &[(&str, &str)]) {
        assert!(self.name_of(name).is_none(), "{name} is there already");
        self.add(name, true);
        let mut state = self.state();
        let mut all = state.images.get(image).cloned().flatten().unwrap_or_default();
        all.extend(labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let container = state.containers.get_mut(name).unwrap();
        (container.image, container.labels) = (image.to_owned(), all);
        drop(state);
        self.announce("create", name);
        self.announce("start", name);
    }

    /// Gives a container another name, and tells of it.
    ///
    /// # Panics
    /// When there is no such container.
    pub fn rename_to(&self, old: &str, new: &str) {
        let mut state = self.state();
        let container = state.containers.remove(old).unwrap();
        let id = container.id.clone();
        state.containers.insert(new.to_owned(), container);
        drop(state);
        self.tell_with("rename", &id, &json!({"name": new, "oldName": format!("/{old}")}));
    }

    /// The same as Docker may do it: so many whole lists after it was told show both names.
    ///
    /// # Panics
    /// When there is no such container.
    pub fn rename_slowly(&self, old: &str, new: &str, lists: u32) {
        let id = self.id(old);
        self.state().former.insert(id, (old.to_owned(), lists));
        self.rename_to(old, new);
    }

    /// Has the next whole list wait, with what it is to tell by then.
    pub fn hold_list(&self) {
        self.state().list = Held::Next;
    }

    /// Waits until a list is held.
    ///
    /// # Panics
    /// When none is asked for.
    #[track_caller]
    pub fn wait_for_held_list(&self) {
        wait_until("a list to be held", || match self.state().list {
            Held::Yes => Ok(()),
            held => Err(held),
        });
    }

    /// Lets go of the list that is held.
    pub fn let_list_go(&self) {
        self.state().list = Held::No;
        self.0.changed.notify_all();
    }

    /// The id of a container.
    ///
    /// # Panics
    /// When there is no such container.
    pub fn id(&self, name: &str) -> String {
        self.state().containers[name].id.clone()
    }

    /// Ends every stream of events, as an engine does that is stopped.
    pub fn hang_up(&self) {
        for listener in self.state().listeners.drain(..) {
            // One that is gone has ended already.
            let _ = listener.shutdown(Shutdown::Both);
        }
    }

    /// Tells nobody what happens, and refuses whoever asks for that; or does so no longer.
    pub fn silence(&self, silent: bool) {
        self.state().is_silent = silent;
        if silent {
            self.hang_up();
        }
    }

    /// Has a container run from now on, and tells of it.
    ///
    /// # Panics
    /// When there is no such container.
    pub fn run(&self, name: &str) {
        self.state().containers.get_mut(name).unwrap().running = true;
        self.announce("start", name);
    }

    /// Publishes a container's port 8973 on a port of the host, or no longer.
    ///
    /// # Panics
    /// When there is no such container.
    pub fn publish(&self, name: &str, port: Option<u16>) {
        self.state().containers.get_mut(name).unwrap().published = port;
    }

    /// Has a container have this first process, and an inspection tell this of it beside or instead of the usual.
    ///
    /// # Panics
    /// When there is no such container.
    pub fn inhabit(&self, name: &str, pid: u32, told: Value) {
        let mut state = self.state();
        let container = state.containers.get_mut(name).unwrap();
        (container.pid, container.told) = (pid, told);
    }

    /// Forgets a container, without an event when `quietly`.
    pub fn remove(&self, name: &str, quietly: bool) {
        let gone = self.state().containers.remove(name);
        if let (Some(container), false) = (gone, quietly) {
            self.tell("destroy", name, &container.id);
        }
    }

    /// Leaves a container out of the next list that is asked for by its name, and of that one only.
    pub fn miss_once(&self, name: &str) {
        self.state().missed.push(name.to_owned());
    }

    /// Tells whoever listens that something happened to a container.
    ///
    /// # Panics
    /// When there is no such container.
    pub fn announce(&self, action: &str, name: &str) {
        let id = self.state().containers[name].id.clone();
        self.tell(action, name, &id);
    }

    /// Whether it runs.
    pub fn is_running(&self, name: &str) -> bool {
        self.state().containers.get(name).is_some_and(|container| container.running)
    }

    /// Holds every stop until it is let go.
    pub fn hold_stops(&self, held: bool) {
        self.state().stops_held = held;
        self.0.changed.notify_all();
    }

    /// How often a call was made whose `METHOD path` begins so.
    pub fn calls(&self, beginning: &str) -> usize {
        self.state().calls.iter().filter(|call| call.starts_with(beginning)).count()
    }

    /// Every call so far that changes something, in order.
    pub fn changes(&self) -> Vec<String> {
        self.state().calls.iter().filter(|call| !call.starts_with("GET ")).cloned().collect()
    }

    /// How often it was asked about a container, by list or by name.
    pub fn probes(&self) -> usize {
        self.calls("GET /containers/")
    }

    /// Waits until it was asked about containers so many times more.
    ///
    /// # Panics
    /// When it is not.
    #[track_caller]
    pub fn wait_for_probes(&self, more: usize) {
        let wanted = self.probes() + more;
        wait_until("the daemon to ask Docker", || {
            let probes = self.probes();
            if probes >= wanted { Ok(()) } else { Err((probes, wanted)) }
        });
    }

    /// Waits until a call was made so often.
    ///
    /// # Panics
    /// When it is not.
    #[track_caller]
    pub fn wait_for_calls(&self, beginning: &str, count: usize) {
        wait_until(&format!("{count} of {beginning}"), || {
            let calls = self.state().calls.clone();
            let made = calls.iter().filter(|call| call.starts_with(beginning)).count();
            if made >= count { Ok(()) } else { Err(calls) }
        });
    }

    fn tell(&self, action: &str, name: &str, id: &str) {
        self.tell_with(action, id, &json!({"name": name}));
    }

    fn tell_with(&self, action: &str, id: &str, attributes: &Value) {
        let event = json!({"Type": "container", "Action": action, "scope": "local", "time": 1, "timeNano": 1,
            "Actor": {"ID": id, "Attributes": attributes}});
        let line = format!("{event}\n");
        let chunk = format!("{:x}\r\n{line}\r\n", line.len());
        let mut state = self.state();
        state.listeners.retain_mut(|listener| listener.write_all(chunk.as_bytes()).is_ok());
        state.told.push((SystemTime::now(), chunk));
    }

    fn serve(&self, stream: &UnixStream) {
        let mut reader = BufReader::new(stream);
        while let Some(request) = read_request(&mut reader) {
            self.state().calls.push(format!("{} {}", request.method, request.path));
            self.0.changed.notify_all();
            let mut writer = stream;
            let sent = match self.reply(&request) {
                Reply::Json(status, body) => respond(writer, status, &body.to_string()),
                Reply::Nothing(status) => respond(writer, status, ""),
                Reply::Hang => return self.hang(),
                Reply::Events => {
                    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
                    // Whoever asks for them hears what was told since then, and misses nothing in between.
                    let since = parameter(&request.query, "since").and_then(|since| since.parse().ok());
                    let since = since.map(|since| SystemTime::UNIX_EPOCH + Duration::from_secs(since));
                    let mut state = self.state();
                    let mut text = head.to_owned();
                    let missed = state.told.iter().filter(|(at, _)| since.is_some_and(|since| *at >= since));
                    text.extend(missed.map(|(_, chunk)| chunk.as_str()));
                    if writer.write_all(text.as_bytes()).is_ok() {
                        state.listeners.extend(stream.try_clone());
                    }
                    return;
                }
            };
            if sent.is_err() {
                return;
            }
        }
    }

    /// Keeps the connection until it is told to answer again, and lets go of it without an answer then.
    fn hang(&self) {
        let mut state = self.state();
        while state.mode == DockerMode::Hangs {
            state = self.0.changed.wait(state).unwrap();
        }
    }

    fn reply(&self, request: &Request) -> Reply {
        match self.state().mode {
            DockerMode::Answers => {}
            DockerMode::Fails => return Reply::Json(500, json!({"message": "the engine is unwell"})),
            DockerMode::Hangs => return Reply::Hang,
        }
        let parts: Vec<&str> = request.path.trim_matches('/').split('/').collect();
        match (request.method.as_str(), parts.as_slice()) {
            ("GET" | "HEAD", ["_ping"]) => Reply::Json(200, json!("OK")),
            ("GET", ["version"]) => {
                Reply::Json(200, json!({"Version": "29.0.0", "ApiVersion": "1.53", "MinAPIVersion": "1.24"}))
            }
            ("GET", ["events"]) if self.state().is_silent => {
                Reply::Json(500, json!({"message": "nothing is told"}))
            }
            ("GET", ["events"]) => Reply::Events,
            ("GET", ["networks", "bridge"]) => {
                let gateway = self.state().gateway;
                let pools: Vec<Value> = gateway.iter().map(|gateway| json!({"Gateway": gateway})).collect();
                Reply::Json(200, json!({"Name": "bridge", "IPAM": {"Config": pools}}))
            }
            ("GET", ["containers", "json"]) => self.list(&request.query),
            ("GET", ["containers", name, "json"]) => self.inspect(name),
            ("POST", ["containers", name, "stop"]) => self.stop(name),
            ("POST", ["containers", name, "start"]) => self.start_container(name),
            ("POST", ["containers", "create"]) => self.create(&request.query, &request.body),
            ("POST", ["containers", name, "rename"]) => self.rename(name, &request.query),
            ("DELETE", ["containers", name]) => {
                self.remove(name, false);
                Reply::Nothing(204)
            }
            ("POST", ["build"]) => Reply::Json(200, json!({"stream": "Successfully built 1\n"})),
            ("GET", ["images", image, "json"]) => self.inspect_image(image),
            _ => Reply::Json(404, json!({"message": "page not found"})),
        }
    }

    /// The name is a regular expression to Docker; the daemon anchors it, so what is between the anchors is the name.
    fn list(&self, query: &str) -> Reply {
        let all = parameter(query, "all").is_some_and(|all| all == "true" || all == "1");
        let filters: Value = parameter(query, "filters")
            .and_then(|filters| serde_json::from_str(&filters).ok())
            .unwrap_or_default();
        let pattern = filters["name"][0].as_str().unwrap_or_default().replace('\\', "");
        let anchored = pattern.strip_prefix('^').and_then(|rest| rest.strip_suffix('$'));
        let exact = anchored.map(|exact| exact.trim_start_matches(['/', '?']));
        let mut state = self.state();
        if let Some(at) = state.missed.iter().position(|missed| Some(missed.as_str()) == exact) {
            state.missed.remove(at);
            return Reply::Json(200, json!([]));
        }
        let fits = |name: &str| match exact {
            Some(exact) => name == exact,
            None => name.contains(&pattern),
        };
        let found =
            state.containers.iter().filter(|(name, container)| fits(name) && (all || container.running));
        let found: Vec<Value> = found
            .map(|(name, container)| {
                let running = if container.running { "running" } else { "exited" };
                let former = state.former.get(&container.id).map(|(former, _)| former);
                let names: BTreeSet<String> = former.into_iter().chain([name]).map(|name| format!("/{name}")).collect();
                json!({"Id": container.id, "Names": names, "Image": container.image, "State": running,
                    "ImageID": images::id_of(&container.image),
                    "Labels": container.labels, "Created": container.created, "HostConfig": {"NetworkMode": "bridge"}})
            })
            .collect();
        if pattern.is_empty() {
            state.former.retain(|_, (_, lists)| {
                *lists -= 1;
                *lists > 0
            });
            if state.list == Held::Next {
                state.list = Held::Yes;
                while state.list == Held::Yes {
                    state = self.0.changed.wait(state).unwrap();
                }
            }
        }
        Reply::Json(200, Value::Array(found))
    }

    /// The name of a container that is named or whose id is given.
    fn name_of(&self, wanted: &str) -> Option<String> {
        let state = self.state();
        let mut all = state.containers.iter();
        all.find(|(name, container)| *name == wanted || container.id == wanted).map(|(name, _)| name.clone())
    }

    fn inspect(&self, wanted: &str) -> Reply {
        let Some(name) = self.name_of(wanted) else { return no_such(wanted) };
        let container = self.state().containers[&name].clone();
        let ports = match container.published {
            // Docker tells both families, and the first one is not always IPv4.
            Some(port) => json!({"8973/tcp": [{"HostIp": "::1", "HostPort": "1"},
                {"HostIp": "127.0.0.1", "HostPort": port.to_string()}]}),
            None => json!({}),
        };
        let mut answer = json!({
            "Id": container.id, "Name": format!("/{name}"), "Image": format!("sha256:{}", container.id),
            "State": {"Running": container.running, "Pid": container.pid, "StartedAt": "2026-01-01T00:00:00Z",
                "Status": if container.running { "running" } else { "exited" }},
            "Config": {"Image": container.image, "Env": [], "Cmd": ["sleep"]},
            "HostConfig": {"NetworkMode": "bridge", "AutoRemove": false}, "NetworkSettings": {"Networks": {}, "Ports": ports},
        });
        merge(&mut answer, &container.told);
        Reply::Json(200, answer)
    }

    fn stop(&self, wanted: &str) -> Reply {
        let Some(name) = self.name_of(wanted) else { return no_such(wanted) };
        let mut state = self.state();
        while state.stops_held {
            state = self.0.changed.wait(state).unwrap();
        }
        let Some(container) = state.containers.get_mut(&name) else { return no_such(wanted) };
        let was_running = std::mem::replace(&mut container.running, false);
        let id = container.id.clone();
        drop(state);
        if was_running {
            self.tell("die", &name, &id);
        }
        Reply::Nothing(if was_running { 204 } else { 304 })
    }

    fn start_container(&self, wanted: &str) -> Reply {
        let Some(name) = self.name_of(wanted) else { return no_such(wanted) };
        if let Some(message) = self.state().start_error.clone() {
            return Reply::Json(500, json!({"message": message}));
        }
        let id = {
            let mut state = self.state();
            let Some(container) = state.containers.get_mut(&name) else { return no_such(wanted) };
            container.running = true;
            container.id.clone()
        };
        self.tell("start", &name, &id);
        Reply::Nothing(204)
    }

    fn rename(&self, wanted: &str, query: &str) -> Reply {
        let (Some(name), Some(new)) = (self.name_of(wanted), parameter(query, "name")) else {
            return no_such(wanted);
        };
        self.rename_to(&name, &new);
        Reply::Nothing(204)
    }
}

/// Puts what `more` tells in the place of what `answer` tells.
fn merge(answer: &mut Value, more: &Value) {
    match (answer, more) {
        (Value::Object(answer), Value::Object(more)) => {
            for (key, value) in more {
                merge(answer.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (_, Value::Null) => {}
        (answer, more) => *answer = more.clone(),
    }
}

fn no_such(name: &str) -> Reply {
    Reply::Json(404, json!({"message": format!("No such container: {name}")}))
}

/// A moment in which something that must not happen would have happened; the only wait for a while there is.
pub const MOMENT: Duration = Duration::from_millis(200);

const _: () = assert!(PATIENCE.as_millis() > 10 * MOMENT.as_millis());
