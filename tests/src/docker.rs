//! A scripted Docker engine: it looks up containers by name, counts requests, and can fail, hang or delay a stop until the
//! case releases it. One thread per connection; it implements the part of the API that one daemon uses.

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
use crate::{Home, TIMEOUT, wait_until};

/// The treatment of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DockerMode {
    /// Answers normally.
    Answers,
    /// Answers every request with 500.
    Fails,
    /// Accepts requests and never answers.
    Hangs,
}

#[derive(Clone, Debug)]
struct Container {
    id: String,
    running: bool,
    pid: u32,
    image: String,
    /// The host port on which port 8973 is published.
    published: Option<u16>,
    labels: BTreeMap<String, String>,
    /// The creation time; each container has a different second.
    created: u32,
    /// Fields of an inspection that replace the usual ones.
    reported: Value,
    /// The request that created it.
    create_request: Value,
}

/// The state of a delayed answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    No,
    /// The next answer will be delayed.
    Next,
    Yes,
}

#[derive(Debug)]
struct State {
    mode: DockerMode,
    containers: BTreeMap<String, Container>,
    /// Containers that the next list by name omits, once each.
    missed: Vec<String>,
    /// Former names, by id: this many further complete lists contain them beside the new name.
    former: BTreeMap<String, (String, u32)>,
    /// The labels of images that have labels, by name; `None` for a deleted image.
    images: BTreeMap<String, Option<BTreeMap<String, String>>>,
    /// Whether a complete list waits, with its content, until the case releases it.
    list: Held,
    /// The error of every start, if set.
    start_error: Option<String>,
    /// Stops wait while this is true.
    stops_held: bool,
    /// The gateway of the network `bridge`.
    gateway: Option<IpAddr>,
    /// Events are disabled while this is true.
    events_disabled: bool,
    /// The requests so far, as `METHOD path`, in order.
    calls: Vec<String>,
    /// One sender for each open `/events` stream.
    listeners: Vec<UnixStream>,
    /// The events so far, as they were sent, with their times.
    reported: Vec<(SystemTime, String)>,
    made: u32,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The scripted engine; it listens until the case ends.
#[derive(Clone, Debug)]
pub struct FakeDocker(Arc<Shared>);

enum Reply {
    Json(u16, Value),
    Nothing(u16),
    Events,
    Hang,
}

impl FakeDocker {
    /// Listens where `home` expects Docker, with these containers running.
    ///
    /// # Panics
    /// If the socket cannot be bound.
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
            events_disabled: false,
            calls: Vec::new(),
            listeners: Vec::new(),
            reported: Vec::new(),
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

    /// Sets the treatment of requests, including waiting ones.
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
            // No process has this pid, so an attempt to open its namespace finds none.
            pid: 0,
            image: format!("image-of-{name}"),
            published: None,
            labels: BTreeMap::new(),
            created: state.made,
            reported: Value::Null,
            create_request: Value::Null,
        };
        state.containers.insert(name.to_owned(), container);
    }

    /// Creates and starts a container with labels, and emits both events.
    ///
    /// # Panics
    /// If a container with this name exists.
    pub fn launch(&self, name: &str, labels: &[(&str, &str)]) {
        self.launch_from(&format!("image-of-{name}"), name, labels);
    }

    /// The same with an image: its labels are copied to the container, unless the container's own labels override them.
    ///
    /// # Panics
    /// If a container with this name exists.
    pub fn launch_from(&self, image: &str, name: &str, labels: &[(&str, &str)]) {
        assert!(self.name_of(name).is_none(), "{name} is there already");
        self.add(name, true);
        let mut state = self.state();
        let mut all = state.images.get(image).cloned().flatten().unwrap_or_default();
        all.extend(labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let container = state.containers.get_mut(name).unwrap();
        (container.image, container.labels) = (image.to_owned(), all);
        drop(state);
        self.emit_event("create", name);
        self.emit_event("start", name);
    }

    /// Renames a container and emits the event.
    ///
    /// # Panics
    /// If the container does not exist.
    pub fn rename_to(&self, old: &str, new: &str) {
        let mut state = self.state();
        let container = state.containers.remove(old).unwrap();
        let id = container.id.clone();
        state.containers.insert(new.to_owned(), container);
        drop(state);
        self.emit_with("rename", &id, &json!({"name": new, "oldName": format!("/{old}")}));
    }

    /// The same as Docker can do it: this many complete lists after the event contain both names.
    ///
    /// # Panics
    /// If the container does not exist.
    pub fn rename_slowly(&self, old: &str, new: &str, lists: u32) {
        let id = self.id(old);
        self.state().former.insert(id, (old.to_owned(), lists));
        self.rename_to(old, new);
    }

    /// Delays the next complete list, with its content at that time.
    pub fn hold_list(&self) {
        self.state().list = Held::Next;
    }

    /// Waits until a list is delayed.
    ///
    /// # Panics
    /// If no list is requested.
    #[track_caller]
    pub fn wait_for_held_list(&self) {
        wait_until("a list to be held", || match self.state().list {
            Held::Yes => Ok(()),
            held => Err(held),
        });
    }

    /// Releases the delayed list.
    pub fn release_list(&self) {
        self.state().list = Held::No;
        self.0.changed.notify_all();
    }

    /// Returns the id of a container.
    ///
    /// # Panics
    /// If the container does not exist.
    pub fn id(&self, name: &str) -> String {
        self.state().containers[name].id.clone()
    }

    /// Ends every stream of events, as an engine that is stopped does.
    pub fn hang_up(&self) {
        for listener in self.state().listeners.drain(..) {
            // A closed stream has ended already.
            let _ = listener.shutdown(Shutdown::Both);
        }
    }

    /// Disables events and refuses requests for them, or enables both again.
    pub fn set_events_disabled(&self, disabled: bool) {
        self.state().events_disabled = disabled;
        if disabled {
            self.hang_up();
        }
    }

    /// Starts a container and emits the event.
    ///
    /// # Panics
    /// If the container does not exist.
    pub fn run(&self, name: &str) {
        self.state().containers.get_mut(name).unwrap().running = true;
        self.emit_event("start", name);
    }

    /// Publishes a container's port 8973 on a port of the host, or stops that.
    ///
    /// # Panics
    /// If the container does not exist.
    pub fn publish(&self, name: &str, port: Option<u16>) {
        self.state().containers.get_mut(name).unwrap().published = port;
    }

    /// Sets the first process of a container, and fields of its inspection that are added or replaced.
    ///
    /// # Panics
    /// If the container does not exist.
    pub fn set_process(&self, name: &str, pid: u32, reported: Value) {
        let mut state = self.state();
        let container = state.containers.get_mut(name).unwrap();
        (container.pid, container.reported) = (pid, reported);
    }

    /// Removes a container, without an event if `quietly`.
    pub fn remove(&self, name: &str, quietly: bool) {
        let gone = self.state().containers.remove(name);
        if let (Some(container), false) = (gone, quietly) {
            self.emit("destroy", name, &container.id);
        }
    }

    /// Omits a container from the next list by its name, once.
    pub fn omit_once(&self, name: &str) {
        self.state().missed.push(name.to_owned());
    }

    /// Emits an event about a container.
    ///
    /// # Panics
    /// If the container does not exist.
    pub fn emit_event(&self, action: &str, name: &str) {
        let id = self.state().containers[name].id.clone();
        self.emit(action, name, &id);
    }

    /// Returns whether a container runs.
    pub fn is_running(&self, name: &str) -> bool {
        self.state().containers.get(name).is_some_and(|container| container.running)
    }

    /// Delays every stop until it is released.
    pub fn hold_stops(&self, held: bool) {
        self.state().stops_held = held;
        self.0.changed.notify_all();
    }

    /// Counts the requests whose `METHOD path` starts with `beginning`.
    pub fn calls(&self, beginning: &str) -> usize {
        self.state().calls.iter().filter(|call| call.starts_with(beginning)).count()
    }

    /// Returns every request so far that changes state, in order.
    pub fn changes(&self) -> Vec<String> {
        self.state().calls.iter().filter(|call| !call.starts_with("GET ")).cloned().collect()
    }

    /// Counts the requests about a container, by list or by name.
    pub fn probes(&self) -> usize {
        self.calls("GET /containers/")
    }

    /// Waits until the engine has received this many further requests about containers.
    ///
    /// # Panics
    /// If it does not receive them.
    #[track_caller]
    pub fn wait_for_probes(&self, more: usize) {
        let wanted = self.probes() + more;
        wait_until("the daemon to ask Docker", || {
            let probes = self.probes();
            if probes >= wanted { Ok(()) } else { Err((probes, wanted)) }
        });
    }

    /// Waits until a request was made this often.
    ///
    /// # Panics
    /// If it was not.
    #[track_caller]
    pub fn wait_for_calls(&self, beginning: &str, count: usize) {
        wait_until(&format!("{count} of {beginning}"), || {
            let calls = self.state().calls.clone();
            let made = calls.iter().filter(|call| call.starts_with(beginning)).count();
            if made >= count { Ok(()) } else { Err(calls) }
        });
    }

    fn emit(&self, action: &str, name: &str, id: &str) {
        self.emit_with(action, id, &json!({"name": name}));
    }

    fn emit_with(&self, action: &str, id: &str, attributes: &Value) {
        let event = json!({"Type": "container", "Action": action, "scope": "local", "time": 1, "timeNano": 1,
            "Actor": {"ID": id, "Attributes": attributes}});
        let line = format!("{event}\n");
        let chunk = format!("{:x}\r\n{line}\r\n", line.len());
        let mut state = self.state();
        state.listeners.retain_mut(|listener| listener.write_all(chunk.as_bytes()).is_ok());
        state.reported.push((SystemTime::now(), chunk));
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
                    // A new stream first sends the events since the requested time, so that none is missed.
                    let since = parameter(&request.query, "since").and_then(|since| since.parse().ok());
                    let since = since.map(|since| SystemTime::UNIX_EPOCH + Duration::from_secs(since));
                    let mut state = self.state();
                    let mut text = head.to_owned();
                    let missed =
                        state.reported.iter().filter(|(at, _)| since.is_some_and(|since| *at >= since));
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

    /// Keeps the connection open until the engine answers again, and then closes it without an answer.
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
            ("GET", ["events"]) if self.state().events_disabled => {
                Reply::Json(500, json!({"message": "events are disabled"}))
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

    /// To Docker the name is a regular expression. The daemon anchors it, so the text between the anchors is the name.
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

    /// Returns the name of a container from its name or id.
    fn name_of(&self, wanted: &str) -> Option<String> {
        let state = self.state();
        let mut all = state.containers.iter();
        all.find(|(name, container)| *name == wanted || container.id == wanted).map(|(name, _)| name.clone())
    }

    fn inspect(&self, wanted: &str) -> Reply {
        let Some(name) = self.name_of(wanted) else { return not_found(wanted) };
        let container = self.state().containers[&name].clone();
        let ports = match container.published {
            // Docker reports both families, and the first one is not always IPv4.
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
        merge(&mut answer, &container.reported);
        Reply::Json(200, answer)
    }

    fn stop(&self, wanted: &str) -> Reply {
        let Some(name) = self.name_of(wanted) else { return not_found(wanted) };
        let mut state = self.state();
        while state.stops_held {
            state = self.0.changed.wait(state).unwrap();
        }
        let Some(container) = state.containers.get_mut(&name) else { return not_found(wanted) };
        let was_running = std::mem::replace(&mut container.running, false);
        let id = container.id.clone();
        drop(state);
        if was_running {
            self.emit("die", &name, &id);
        }
        Reply::Nothing(if was_running { 204 } else { 304 })
    }

    fn start_container(&self, wanted: &str) -> Reply {
        let Some(name) = self.name_of(wanted) else { return not_found(wanted) };
        if let Some(message) = self.state().start_error.clone() {
            return Reply::Json(500, json!({"message": message}));
        }
        let id = {
            let mut state = self.state();
            let Some(container) = state.containers.get_mut(&name) else { return not_found(wanted) };
            container.running = true;
            container.id.clone()
        };
        self.emit("start", &name, &id);
        Reply::Nothing(204)
    }

    fn rename(&self, wanted: &str, query: &str) -> Reply {
        let (Some(name), Some(new)) = (self.name_of(wanted), parameter(query, "name")) else {
            return not_found(wanted);
        };
        self.rename_to(&name, &new);
        Reply::Nothing(204)
    }
}

/// Merges the fields of `more` into `answer`; fields of `more` win.
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

fn not_found(name: &str) -> Reply {
    Reply::Json(404, json!({"message": format!("No such container: {name}")}))
}

/// The time after which something that must not happen would have happened; the only fixed wait of the suite.
pub const NEGATIVE_WAIT: Duration = Duration::from_millis(200);

const _: () = assert!(TIMEOUT.as_millis() > 10 * NEGATIVE_WAIT.as_millis());
