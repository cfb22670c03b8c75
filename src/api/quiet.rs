//! The end of a body wakes nobody.
//!
//! Whoever takes a part of a body wakes the connection that brought it, so that it brings the next; hyper does so with the last
//! part too, when there is nothing to bring any more. To the runtime a task that is woken while it runs has yielded: it goes to
//! the end of the queue, and a thread that sleeps is woken to look at it, for nothing, in the middle of every request that has
//! a body. So the wake-up of a part is held back until it is known whether that was the last. Nothing rests on it: a connection
//! looks whether there is more to read whenever it is polled, and it is polled when there is an answer.

use std::cell::RefCell;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

/// The task of a connection.
#[derive(Default)]
struct Bell(AtomicWaker);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let held = HELD.with_borrow_mut(|held| match held {
            Held::Back(first @ None) => {
                *first = Some(self.clone());
                true
            }
            _ => false,
        });
        if !held {
            self.0.wake();
        }
    }
}

/// What becomes of wake-ups that are made on this thread.
enum Held {
    /// They are made.
    No,
    /// The first waits.
    Back(Option<Arc<Bell>>),
}

thread_local! {
    static HELD: RefCell<Held> = const { RefCell::new(Held::No) };
}

/// A wake-up that was held back; one that is dropped was for nothing.
pub(super) struct Woken(Option<Arc<Bell>>);

impl Woken {
    /// Makes it.
    pub fn wake(self) {
        if let Some(bell) = self.0 {
            bell.0.wake();
        }
    }
}

/// Wake-ups are made again when this ends, if by a panic too.
struct Holding;

impl Drop for Holding {
    fn drop(&mut self) {
        HELD.set(Held::No);
    }
}

/// Takes a part of a body, and holds back the wake-up of the connection that brings it.
pub(super) fn hold<T>(take: impl FnOnce() -> T) -> (T, Woken) {
    let _holding = Holding;
    HELD.set(Held::Back(None));
    let taken = take();
    let woken = HELD.with_borrow_mut(|held| match held {
        Held::Back(woken) => woken.take(),
        Held::No => None,
    });
    (taken, Woken(woken))
}

/// A connection whose wake-ups can be held back.
pub(super) struct Quiet<F> {
    connection: Pin<Box<F>>,
    bell: Arc<Bell>,
    waker: Waker,
}

impl<F: Future> Quiet<F> {
    pub fn new(connection: F) -> Self {
        let bell = Arc::<Bell>::default();
        Self { connection: Box::pin(connection), waker: Waker::from(bell.clone()), bell }
    }

    /// The connection.
    pub fn inner(&mut self) -> Pin<&mut F> {
        self.connection.as_mut()
    }
}

impl<F: Future> Future for Quiet<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let me = self.get_mut();
        // First, so that who wakes it from now on knows whom.
        me.bell.0.register(cx.waker());
        me.connection.as_mut().poll(&mut Context::from_waker(&me.waker))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::ready;

    use crate::kernel::supervisor::detach;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Count {
        fn get(&self) -> usize {
            self.0.load(Ordering::SeqCst)
        }
    }

    /// A connection that leaves its waker here.
    fn connection(kept: &Arc<Mutex<Option<Waker>>>) -> Quiet<impl Future<Output = ()>> {
        let kept = kept.clone();
        Quiet::new(std::future::poll_fn(move |cx| {
            *kept.lock().unwrap() = Some(cx.waker().clone());
            Poll::<()>::Pending
        }))
    }

    #[test]
    fn a_wake_up_is_held_back_on_this_thread_and_made_or_not() {
        let (count, kept) = (Arc::new(Count::default()), Arc::default());
        let mut connection = connection(&kept);
        let task = Waker::from(count.clone());
        let mut poll = || assert!(Pin::new(&mut connection).poll(&mut Context::from_waker(&task)).is_pending());
        let waker = || kept.lock().unwrap().clone().unwrap();

        poll();
        let ((), woken) = hold(|| waker().wake_by_ref());
        assert_eq!(count.get(), 0);
        woken.wake();
        assert_eq!(count.get(), 1);

        poll();
        let ((), woken) = hold(|| waker().wake_by_ref());
        drop(woken);
        assert_eq!(count.get(), 1);
        waker().wake_by_ref();
        assert_eq!(count.get(), 2, "what was dropped before hides nothing that comes later");

        poll();
        let ((), woken) = hold(|| std::thread::scope(|s| s.spawn(|| waker().wake_by_ref()).join().unwrap()));
        drop(woken);
        assert_eq!(count.get(), 3, "another thread is heard");

        poll();
        let panics = || hold(|| -> () { panic!("on purpose") });
        assert!(std::panic::catch_unwind(panics).is_err());
        waker().wake_by_ref();
        assert_eq!(count.get(), 4, "after a panic nothing is held back");
    }

    #[test]
    fn whoever_polled_it_last_is_woken() {
        let kept = Arc::default();
        let mut connection = connection(&kept);
        let (first, second) = (Arc::new(Count::default()), Arc::new(Count::default()));
        for count in [&first, &second] {
            let task = Waker::from(count.clone());
            assert!(Pin::new(&mut connection).poll(&mut Context::from_waker(&task)).is_pending());
            kept.lock().unwrap().clone().unwrap().wake();
        }
        assert_eq!((first.get(), second.get()), (1, 1));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_wake_up_is_lost_between_threads() {
        // A channel of one place, filled by one task and emptied by another: if a wake-up were lost they would stop.
        let (tx, mut rx) = tokio::sync::mpsc::channel(1);
        let send = detach(Quiet::new(async move {
            for i in 0..100_000 {
                tx.send(i).await.unwrap();
            }
        }));
        let mut next = 0;
        let receive = detach(Quiet::new(std::future::poll_fn(move |cx| {
            while let Some(i) = ready!(rx.poll_recv(cx)) {
                assert_eq!(i, next);
                next += 1;
            }
            Poll::Ready(next)
        })));
        let within = std::time::Duration::from_secs(60);
        assert_eq!(tokio::time::timeout(within, receive).await.unwrap().unwrap(), 100_000);
        send.await.unwrap();
    }
}
