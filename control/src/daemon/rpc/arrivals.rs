//! Requests that arrive together are taken up in the order in which their connections were made, so that a register and
//! the deregister that follows it end unregistered (wire specification, A.7.3), also over two connections.
//!
//! The kernel alone does not see to that: while it gathers what is ready, the line of an earlier connection may arrive
//! just after that one was looked at and just before a later one is, whose line then comes first. So whoever has a whole
//! line waits until everything that is ready has been read once more, and then all that wait go on, the earliest
//! connection first.

use std::collections::BTreeMap;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;
use tokio::task::yield_now;

/// Those that have a request and wait for their turn, by the number of their connection. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Arrivals(Arc<Mutex<BTreeMap<u64, oneshot::Sender<()>>>>);

impl Arrivals {
    /// Waits for the turn of a connection that has its request.
    pub(super) async fn turn(&self, number: u64) {
        let (go, gone) = oneshot::channel();
        let is_first = {
            let mut waiting = self.lock();
            waiting.insert(number, go);
            waiting.len() == 1
        };
        if is_first {
            let arrivals = self.clone();
            tokio::spawn(async move { arrivals.release().await });
        }
        // It ends without a word only when the runtime does.
        let _ = gone.await;
    }

    /// Lets everybody go on, after one more look at what is ready: a task that yields comes back after the runtime has
    /// asked the kernel, and behind the tasks that this woke.
    async fn release(&self) {
        yield_now().await;
        let waiting = mem::take(&mut *self.lock());
        for go in waiting.into_values() {
            // One whose connection has ended waits no more.
            let _ = go.send(());
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, oneshot::Sender<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_util::sync::CancellationToken;

    /// Takes up connections in this order of their lines, and gives back the order in which they go on.
    async fn order_of(lines: &[u64]) -> Vec<u64> {
        let arrivals = Arrivals::default();
        let order = Arc::new(Mutex::new(Vec::new()));
        let takers: Vec<_> = lines
            .iter()
            .map(|number| {
                let (arrivals, order, number) = (arrivals.clone(), Arc::clone(&order), *number);
                tokio::spawn(async move {
                    arrivals.turn(number).await;
                    order.lock().unwrap().push(number);
                })
            })
            .collect();
        for taker in takers {
            taker.await.unwrap();
        }
        assert!(arrivals.lock().is_empty());
        Arc::into_inner(order).unwrap().into_inner().unwrap()
    }

    #[tokio::test]
    async fn those_that_arrive_together_go_on_in_the_order_of_their_connections() {
        assert_eq!(order_of(&[2, 1]).await, [1, 2]);
        assert_eq!(order_of(&[1, 2, 3]).await, [1, 2, 3]);
        assert_eq!(order_of(&[7, 9, 8, 3]).await, [3, 7, 8, 9]);
    }

    #[tokio::test]
    async fn one_that_had_to_wait_for_something_goes_before_a_later_one_that_had_not() {
        let (arrivals, settled) = (Arrivals::default(), CancellationToken::new());
        let order = Arc::new(Mutex::new(Vec::new()));
        let taker = |number| {
            let (arrivals, settled, order) = (arrivals.clone(), settled.clone(), Arc::clone(&order));
            async move {
                settled.cancelled().await;
                arrivals.turn(number).await;
                order.lock().unwrap().push(number);
            }
        };
        let earlier = tokio::spawn(taker(1));
        // It waits; and the later one meets what it waits for just when that happens.
        yield_now().await;
        let later = tokio::spawn(taker(2));
        settled.cancel();
        earlier.await.unwrap();
        later.await.unwrap();
        assert_eq!(*order.lock().unwrap(), [1, 2]);
    }

    #[tokio::test]
    async fn one_that_leaves_holds_up_nobody() {
        let arrivals = Arrivals::default();
        let leaver = tokio::spawn({
            let arrivals = arrivals.clone();
            async move { arrivals.turn(1).await }
        });
        leaver.abort();
        arrivals.turn(2).await;
        arrivals.turn(3).await;
    }
}
